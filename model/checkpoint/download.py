"""Heads and fused checkpoints on the Hugging Face Hub: what is there, brought here.

A checkpoint is named by its folder, or by its repository as `owner/name` or `owner/name@revision`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .atomic import recover

HEADS = "draft_heads"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
OURS = "headstart"
CHAT_TEMPLATES = "additional_chat_templates"  # transformers' name for the folder
ADAPTER = "adapter"  # of a head that was trained along with its target
NAMED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
LOGIN = (
    "Run `hf auth login` with a token from https://huggingface.co/settings/tokens (one that may "
    "write, to publish), or set HF_TOKEN."
)
# What a target is made of, at the root of its repository.
TARGET_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")


def hub_name(name: str | Path) -> tuple[str, str | None] | None:
    """The repository and the revision that a name stands for; None when it is that of a folder."""
    text = name.as_posix() if isinstance(name, Path) else name
    found = NAMED.fullmatch(text)
    if found is None or text.startswith((".", "~")) or on_disk(name):
        return None
    return found["repo"], found["revision"]


def on_disk(name: str | Path) -> bool:
    recover(Path(name))
    return Path(name).exists()


def only_on_disk(name: str | Path, purpose: str) -> None:
    """ValueError for a checkpoint on the Hub, where a folder is to be changed."""
    if hub_name(name) is not None:
        raise ValueError(
            f"There is no folder {name}. {purpose} changes a checkpoint, so it takes a folder: "
            f"`hf download {name} --local-dir FOLDER` brings one from the Hub."
        )


def fetch_fused(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a fused checkpoint: itself, or the Hub's files in its cache.

    Only what is used is downloaded, and nothing that is there already; HF_HUB_OFFLINE=1 takes all
    from the cache. revision: a branch, tag or commit of the repository. ValueError where there is
    no such checkpoint.
    """
    found = _repository(name, revision)
    if found is None:
        return Path(name)
    repo, revision = found
    root = _configs(repo, revision)
    if not (root / HEADS / CONFIG).is_file():
        raise ValueError(
            f"{repo} on the Hub holds a draft head without its target. Make a fused checkpoint "
            f"first: `headstart fuse TARGET {name} OUT` (`headstart inspect head {name}` names the "
            "target)."
        )
    with told(repo):
        commit = root.name  # or a push in between would mix two states
        templates = f"{CHAT_TEMPLATES}/*.jinja"
        snapshot_download(repo, revision=commit, allow_patterns=[f"{HEADS}/*", templates])
        snapshot_download(
            repo, revision=commit, allow_patterns=list(TARGET_FILES), ignore_patterns=["*/*"]
        )
    return root


def fetch_head(name: str | Path, revision: str | None = None) -> Path:
    """As `fetch_fused`, for the head of a fused checkpoint or a head alone: the head's folder."""
    found = _repository(name, revision)
    if found is None:
        inner = Path(name) / HEADS
        return inner if inner.is_dir() else Path(name)
    repo, revision = found
    root = _configs(repo, revision)
    fused = (root / HEADS / CONFIG).is_file()
    patterns = [f"{HEADS}/*"] if fused else [WEIGHTS, f"{ADAPTER}/*"]
    with told(repo):
        snapshot_download(repo, revision=root.name, allow_patterns=patterns)
    return root / HEADS if fused else root


def _repository(name: str | Path, revision: str | None) -> tuple[str, str | None] | None:
    found = hub_name(name)
    if found is None:
        if revision is not None:
            raise ValueError(
                f"{name} is a folder, or no name of a repository (owner/name), so it has no "
                f"revision {revision}. Leave the revision out."
            )
        return None
    return found[0], revision or found[1]


def _configs(repo: str, revision: str | None) -> Path:
    """A snapshot of the configurations in a repository; ValueError where it has no draft head."""
    with told(repo):
        patterns = [CONFIG, f"{HEADS}/{CONFIG}"]
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    if not any(holds_head(root / place) for place in (HEADS, ".")):
        raise ValueError(
            f"{repo} on the Hub{f' at {revision}' if revision else ''} holds no draft head of "
            f"Headstart: no {CONFIG} there has {OURS!r} in it. Check the name and the revision."
        )
    return root


def holds_head(folder: Path) -> bool:
    file = folder / CONFIG
    return file.is_file() and head_section(file.read_bytes()) is not None


def head_section(config: bytes) -> dict[str, object] | None:
    """What a config.json says of a draft head of ours; None where it is of something else."""
    try:
        section = json.loads(config)[OURS]
    except (ValueError, KeyError, TypeError):
        return None
    return section if isinstance(section, dict) else None


def check_repo(name: str) -> None:
    """ValueError for what cannot be the name of a repository with its owner."""
    hint = "Write owner/name, with your own user name or an organisation of yours as the owner."
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is no name of a repository: it needs an owner. {hint}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository ({error}). {hint}") from error


@contextmanager
def told(repo: str) -> Iterator[None]:
    """What the Hub or the network refuses, as a ValueError that says what to do."""
    try:
        yield
    except GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{repo}"
        raise ValueError(f"{repo} is gated. Accept its conditions at {page}. {LOGIN}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"There is no folder {repo}, and the Hub has no repository of this name, or a private "
            f"one that is not yours. Check the name. {LOGIN}"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{repo} on the Hub has no such branch, tag or commit. Check the revision."
        ) from error
    except LocalTokenNotFoundError as error:
        raise ValueError(f"You are not logged in to the Hub. {LOGIN}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(_unreachable(repo, error)) from error
    except HfHubHTTPError as error:
        raise ValueError(_refused(repo, error)) from error
    except (HTTPError, ConnectionError) as error:
        raise ValueError(_unreachable(repo, error)) from error


def _unreachable(repo: str, error: Exception) -> str:
    if constants.HF_HUB_OFFLINE:
        return (
            f"There is no folder {repo}, and what is needed of that repository is not in the Hub's "
            "cache, where HF_HUB_OFFLINE forbids the network. Unset it, or download once before."
        )
    return (
        f"The Hub ({constants.ENDPOINT}) could not be reached for {repo}: {error} Check the "
        "network, then run the same command again."
    )


def _refused(repo: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            "The Hub does not know your token (HF_TOKEN, where it is set, comes before what "
            f"`hf auth login` stored). {LOGIN}"
        )
    if status == 403:
        return (
            f"Your token may not write to {repo}: it may only read, or the owner is neither you "
            f"nor an organisation of yours. {LOGIN}"
        )
    if status == 412:
        return f"{repo} was changed on the Hub meanwhile. Run the same command again."
    return f"The Hub refused ({repo}): {error.server_message or error}"
