"""Check whether a head can be transferred to a changed target, such as a fine-tune or a merge.

Only configurations and tokenizers are loaded, so a head that does not fit fails within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from headstart.model.target.load import target_from_config
from headstart.model.target.lora import is_joint
from headstart.model.target.pretrained import open_tokenizer

from .download import fetch_fused, hub_name
from .fused import is_fused
from .head import build_head, folder_of_head, read_head_file
from .layout import HEADS
from .metadata import HeadFile


@dataclass(frozen=True)
class TrainedHead:
    """A head that is to be transferred.

    name: the folder of the head or the fused checkpoint, as the user named it.
    folder: the folder of the head.
    file: its configuration and metadata.
    original: local folder of the target it was trained on, whose weights may have changed since, or
        None if there is none.
    """

    name: str
    folder: Path
    file: HeadFile
    original: str | None

    @classmethod
    def find(cls, name: str | Path, changed: str) -> TrainedHead:
        """Open a head and check that it fits the changed target.

        name: a fused checkpoint or a head, as a folder or Hub id.
        changed: the changed target.

        ValueError if there is no head or it does not fit.
        """
        folder = folder_of_head(name)
        file = read_head_file(folder)
        if is_joint(folder):
            raise ValueError(
                f"The head in {folder} was trained jointly with its target, and that changed "
                f"target is not written yet. Write it first (`headstart fuse {file.meta.target} "
                f"{folder} FUSED`), then graft FUSED."
            )
        original = _original(name, folder, file.meta.target)
        if original is not None and Path(original).resolve() == Path(changed).resolve():
            original = None  # the target was changed in place
        found = cls(str(name), folder, file, original)
        found._check_sizes(changed)
        if original is not None:
            _check_vocabulary(original, changed)
        return found

    def _check_sizes(self, changed: str) -> None:
        target = target_from_config(changed)
        build_head(self.file, self.folder).bind(target)
        if self.original is None:
            return
        layers = target_from_config(self.original).num_layers
        if layers != target.num_layers:
            raise ValueError(
                f"The head in {self.name} was trained on a target with {layers} layers, but "
                f"{changed} has {target.num_layers}. A head is transferred between targets of the "
                "same sizes only. Train a new one with `headstart train`."
            )


def _original(name: str | Path, folder: Path, target: str) -> str | None:
    """The target in the fused checkpoint, or for a head alone the one it was trained on."""
    if folder.name == HEADS and is_fused(folder.parent):
        whole = fetch_fused(name) if hub_name(name) is not None else folder.parent
        return str(whole)
    return target if Path(target).exists() else None


def _check_vocabulary(original: str, changed: str) -> None:
    """Raise ValueError if token ids differ, except for added tokens: fine-tunes add and rename
    those."""
    left, right = open_tokenizer(original), open_tokenizer(changed)
    if isinstance(left, str) or isinstance(right, str):
        return  # decoding reports the missing tokenizer
    ours, theirs = _plain_tokens(left), _plain_tokens(right)
    wrong = sorted(token for token in ours.keys() & theirs if ours[token] != theirs[token])
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{changed} has another vocabulary than {original}: {len(wrong):,} token ids stand for "
            f"other text (token {first} is {theirs[first]!r} instead of {ours[first]!r}), so the "
            "head would draft the wrong tokens. Train a new head with `headstart train`."
        )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    return {number: token for token, number in vocabulary.items() if token not in added}
