"""Whether a head can be carried over to a changed target: a fine-tune or a merge of its own.

Only configurations and tokenizers are read here, so what does not fit is refused within seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from headstart.model.target.load import target_from_config
from headstart.model.target.lora import is_joint
from headstart.model.target.pretrained import open_tokenizer

from .download import HEADS, fetch_fused, hub_name
from .head import HeadFile, build_head, folder_of_head, is_fused, read_head_file


@dataclass(frozen=True)
class TrainedHead:
    """A head that is to be carried over.

    name: of its folder or of the fused one, as it was given. folder: its own. original: where the
    target that it was trained on should be on this disk (its weights may have been changed there);
    None where that is not known.
    """

    name: str
    folder: Path
    file: HeadFile
    original: str | None

    @classmethod
    def find(cls, name: str | Path, changed: str) -> TrainedHead:
        """name: a fused checkpoint or a head, as a folder or on the Hub. changed: the new target.

        ValueError for no head, and for one that does not fit the changed target.
        """
        folder = folder_of_head(name)
        file = read_head_file(folder)
        if is_joint(folder):
            raise ValueError(
                f"The head in {folder} was trained along with its target, and its guesses are for "
                f"that one, which is not made yet. Make it first (`headstart fuse "
                f"{file.meta.target} {folder} FUSED`), then graft FUSED."
            )
        original = _original(name, folder, file.meta.target)
        if original is not None and Path(original).resolve() == Path(changed).resolve():
            original = None  # it was changed in its place
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
                f"{changed} has {target.num_layers}. A head is carried over between targets of the "
                "same sizes: train a new one with `headstart train`."
            )


def _original(name: str | Path, folder: Path, target: str) -> str | None:
    """A fused checkpoint holds it; of a head alone, it is where it was in training."""
    if folder.name == HEADS and is_fused(folder.parent):
        whole = fetch_fused(name) if hub_name(name) is not None else folder.parent
        return str(whole)
    return target if Path(target).exists() else None


def _check_vocabulary(original: str, changed: str) -> None:
    """Added tokens may differ: fine-tunes add some, and give reserved ones a name."""
    left, right = open_tokenizer(original), open_tokenizer(changed)
    if isinstance(left, str) or isinstance(right, str):
        return  # whoever decodes text says so
    ours, theirs = _plain_tokens(left), _plain_tokens(right)
    wrong = sorted(token for token in ours.keys() & theirs if ours[token] != theirs[token])
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"{changed} has another vocabulary than {original}: {len(wrong):,} tokens mean other "
            f"text (token {first} is {theirs[first]!r} instead of {ours[first]!r}), so what the "
            "head guesses would be other text too. Train a new head with `headstart train`."
        )


def _plain_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    added = tokenizer.get_added_vocab()
    vocabulary = tokenizer.get_vocab()
    return {number: token for token, number in vocabulary.items() if token not in added}
