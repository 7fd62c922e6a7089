"""Publish a fused checkpoint, or a head alone, as a repository on the Hugging Face Hub.

One commit uploads all files, so the repository is never in a state between two checkpoints. An
interrupted upload resumes: the Hub keeps the files (with Xet, the parts of files) that it has
received, and the next attempt sends the rest. All checks run before anything is sent.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    hf_hub_download,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

from headstart.model.checkpoint.custom_generate.write import FILES as CODE_FILES
from headstart.model.checkpoint.download import (
    check_repo,
    head_section,
    hub_errors_as_value_errors,
)
from headstart.model.checkpoint.fused import has_edited_card, is_fused
from headstart.model.checkpoint.head import build_head, is_head, read_head_file
from headstart.model.checkpoint.layout import CARD, CONFIG, HEADS, OURS, WEIGHTS
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.checkpoint.model_card import HUB_ID, LICENSE_KEYS, is_edited, model_card
from headstart.model.target.lora import ADAPTER

WEIGHT_FILES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".gguf")
INDEX = ".safetensors.index.json"
PATH = re.compile(r"[/\\~.]|[A-Za-z]:[/\\]")  # the beginning of a file's path


@dataclass(frozen=True)
class PushResult:
    """Result of a push.

    url: of the repository.
    commit: hash of the commit.
    notes: files that were kept instead of replaced, and why.
    """

    url: str
    commit: str
    notes: list[str] = field(default_factory=list)


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    replace: bool = False,
) -> PushResult:
    """Upload a fused checkpoint or a head in one commit.

    folder: the folder to upload.
    repo: name of the repository, `owner/name`.
    private: create a new repository as private.
    revision: branch to commit to, created if there is none.
    message: commit message.
    base_model: Hub id of the target (default: the name it was trained under).
    replace: also replace another model, or a card that was edited on the Hub.

    ValueError if the folder cannot be published (before anything is sent), or if the connection is
    lost.
    """
    check_repo(repo)
    if base_model is not None:
        check_repo(base_model)
    local = _Folder(Path(folder))
    api = HfApi()
    with hub_errors_as_value_errors(repo):
        api.whoami()
        remote = _Repository.fetch(api, repo, revision)
        if remote is not None:
            remote.check(local, private, replace)
        target, license = _base_model(api, local, base_model)
        meta = publishable(local.meta, target)
        notes: list[str] = []
        card = _card(local, meta, repo, license, None if replace else remote, notes)
        changes = local.additions(meta, card)
        if remote is not None:
            changes += remote.deletions({one.path_in_repo for one in changes}, replace)
        if remote is None:
            api.create_repo(repo, private=private or None)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        done = _commit(api, repo, changes, revision, message or local.title, remote)
    return PushResult(f"{api.endpoint}/{repo}", done, notes)


def _commit(
    api: HfApi,
    repo: str,
    changes: list[CommitOperationAdd | CommitOperationDelete],
    revision: str | None,
    message: str,
    remote: _Repository | None,
) -> str:
    """Upload the changes. Returns the hash of the commit."""
    try:
        info = api.create_commit(
            repo,
            changes,
            commit_message=message,
            revision=revision,
            parent_commit=None if remote is None else remote.info.sha,
        )
    except (RuntimeError, ConnectionError) as error:  # raised by uploads of large files
        raise ValueError(
            f"The upload to {repo} was interrupted: {error.__cause__ or error} The Hub keeps what "
            "it has received and shows nothing before all is there. Run the same command again to "
            "resume."
        ) from error
    return str(info.oid)


class _Folder:
    """The folder to publish. ValueError if it is incomplete."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.fused = is_fused(folder)
        if not self.fused and not is_head(folder):
            raise ValueError(
                f"{folder} is neither a fused checkpoint nor the folder of a head, so there is "
                "nothing to publish. Name the output of `headstart fuse`, or a run's best/ folder."
            )
        self.inner = folder / HEADS if self.fused else folder
        self.file = read_head_file(folder)
        self.meta = self.file.meta
        self.head = build_head(self.file, self.inner)
        try:
            with safe_open(self.inner / WEIGHTS, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.inner / WEIGHTS} cannot be read ({error}). It is missing or truncated. "
                "Copy it again."
            ) from error
        if self.fused and not any(_is_weights(file.name) for file in folder.iterdir()):
            raise ValueError(
                f"{folder} has lost its target's weights: there is only the head in {HEADS}. Fuse "
                f"it again, or publish {self.inner} as a head alone."
            )

    @property
    def title(self) -> str:
        what = "a fused checkpoint" if self.fused else "a draft head"
        return f"Upload {what} of kind {self.head.kind}, headstart {self.file.version}"

    @cached_property
    def files(self) -> dict[str, Path]:
        """Paths by name in the repository, without hidden files (download caches, unfinished
        parts)."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            if path.is_file() and not any(part.startswith(".") for part in name.parts):
                found[name.as_posix()] = path
        return found

    def additions(
        self, meta: HeadMeta, card: str | None
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        """The files to upload. card: None keeps the one on the Hub."""
        place = f"{HEADS}/{CONFIG}" if self.fused else CONFIG
        config = json.loads(self.files[place].read_text(encoding="utf-8"))
        config[OURS]["meta"] = meta.model_dump(mode="json")
        texts = {place: json.dumps(config, indent=2) + "\n"}
        if card is not None:
            texts[CARD] = card
        contents: dict[str, Path | bytes] = {
            name: path for name, path in self.files.items() if name != CARD
        }
        contents |= {name: text.encode() for name, text in texts.items()}
        return [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
            for name, content in sorted(contents.items())
        ]


@dataclass(frozen=True)
class _Repository:
    """The repository on the Hub before the push."""

    info: ModelInfo
    repo: str

    @classmethod
    def fetch(cls, api: HfApi, repo: str, revision: str | None) -> _Repository | None:
        """Fetch the state of a repository; None if there is none. A new branch starts from the main
        one."""
        try:
            try:
                info = api.model_info(repo, revision=revision)
            except RevisionNotFoundError:
                info = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        return cls(info, repo)

    @cached_property
    def names(self) -> list[str]:
        return [file.rfilename for file in self.info.siblings or []]

    def read(self, name: str) -> bytes:
        return Path(hf_hub_download(self.repo, name, revision=self.info.sha)).read_bytes()

    def check(self, local: _Folder, private: bool, replace: bool) -> None:
        """Raise ValueError if the push would replace another model or publish a private one."""
        if private and not self.info.private:
            raise ValueError(
                f"{self.repo} exists and is public, but --private was given. Make it "
                "private in its settings on the Hub, or choose another name."
            )
        loss = self._loss(local)
        if loss is not None and not replace:
            raise ValueError(
                f"{self.repo} on the Hub holds {loss}, which would be replaced. Choose another "
                "name, or add --replace (the old files stay in the repository's history)."
            )

    def _loss(self, local: _Folder) -> str | None:
        """Another model on the Hub that the push would replace, in words."""
        fused = f"{HEADS}/{CONFIG}" in self.names
        place = f"{HEADS}/{CONFIG}" if fused else CONFIG
        section = head_section(self.read(place)) if place in self.names else None
        if section is None:
            found = [name for name in self.names if name == CONFIG or _is_weights(name)]
            return f"another model ({', '.join(found[:3])})" if found else None
        if section.get("target_hash") != local.file.target_hash:
            return "a head for another target"
        if fused and not local.fused:
            return "a fused checkpoint, while this is a head alone"
        return None

    def deletions(self, sent: set[str], replace: bool) -> list[CommitOperationDelete]:
        """Remove old weights, heads and their code, which would be loaded instead of the new ones.
        Other files stay."""
        old = (WEIGHT_FILES if replace else (".safetensors",)) + (INDEX,)
        return [
            CommitOperationDelete(path_in_repo=name)
            for name in self.names
            if name not in sent
            and (
                name.startswith((f"{HEADS}/", f"{ADAPTER}/"))
                or name in CODE_FILES
                or _at_root(name, old)
            )
        ]


def _is_weights(name: str) -> bool:
    return _at_root(name, WEIGHT_FILES)


def _at_root(name: str, endings: tuple[str, ...]) -> bool:
    return "/" not in name and name.endswith(endings)


def _base_model(api: HfApi, local: _Folder, given: str | None) -> tuple[str | None, dict[str, str]]:
    """The target's Hub id, if it has one, and its license keys on the Hub."""
    name = given or local.meta.target
    info = None
    if HUB_ID.fullmatch(name):
        try:
            info = api.model_info(name)
        except HfHubHTTPError:  # not on the Hub, or private
            info = None
    if info is None and given is None:
        if not local.fused:
            raise ValueError(
                f"The head was trained on {local.meta.target}, which is not a repository on the "
                "Hub, so nobody could use the head. Name the target with --base-model owner/name."
            )
        return None, {}
    data = info.card_data.to_dict() if info is not None and info.card_data is not None else {}
    return name, {key: data[key] for key in LICENSE_KEYS if isinstance(data.get(key), str)}


def _card(
    local: _Folder,
    meta: HeadMeta,
    repo: str,
    license: dict[str, str],
    remote: _Repository | None,
    notes: list[str],
) -> str | None:
    """The text of README.md, or None to keep the one on the Hub. Edited cards are kept."""
    if has_edited_card(local.folder):
        notes.append(f"{local.folder / CARD} was edited by hand and is published as it is.")
        return (local.folder / CARD).read_text(encoding="utf-8")
    if remote is not None and CARD in remote.names and is_edited(remote.read(CARD).decode()):
        notes.append(
            f"The card of {repo} was edited on the Hub and is kept as it is there. --replace "
            "writes a new one."
        )
        return None
    return model_card(
        local.head,
        meta,
        local.folder,
        place=repo,
        alone=not local.fused,
        license=license,
    )


def publishable(meta: HeadMeta, target: str | None) -> HeadMeta:
    """Return the metadata without local paths, of which only the file names are kept.

    target: Hub id of the target, or None if it has none.
    """
    return meta.model_copy(
        update={
            "target": target or re.split(r"[/\\]", meta.target.rstrip("/\\"))[-1],
            "grafts": tuple(
                one.model_copy(update={"source": _name(one.source)}) for one in meta.grafts
            ),
            "data": meta.data and ", ".join(map(_name, meta.data.split(", "))),
            "start": meta.start and _name(meta.start),
        }
    )


def _name(text: str) -> str:
    path = text.replace("\\", "/")
    is_path = PATH.match(text) or (" " not in text and path.count("/") > 1)
    return path.rstrip("/").rsplit("/", 1)[-1] if is_path else text
