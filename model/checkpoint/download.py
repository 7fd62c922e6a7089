"""Download heads and fused checkpoints from the Hugging Face Hub.

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

from headstart.model.target.lora import ADAPTER

from .atomic import recover
from .layout import CHAT_TEMPLATES, CONFIG, HEADS, OURS, TARGET_FILES, WEIGHTS

HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
LOGIN = (
    "Run `hf auth login` with a token from https://huggingface.co/settings/tokens (one with write "
    "access to publish), or set HF_TOKEN."
)


def hub_name(name: str | Path) -> tuple[str, str | None] | None:
    """Return the repository and revision of a Hub name, or None if it names a folder."""
    text = name.as_posix() if isinstance(name, Path) else name
    found = HUB_NAME.fullmatch(text)
    if found is None or text.startswith((".", "~")) or on_disk(name):
        return None
    return found["repo"], found["revision"]


def on_disk(name: str | Path) -> bool:
    recover(Path(name))
    return Path(name).exists()


def require_folder(name: str | Path, purpose: str) -> None:
    """Raise ValueError if a checkpoint that is to be changed is on the Hub.

    purpose: what changes it, as the subject of the message.
    """
    if hub_name(name) is not None:
        raise ValueError(
            f"There is no folder {name}. {purpose} changes a checkpoint, so it takes a folder. "
            f"Download it first: `hf download {name} --local-dir FOLDER`."
        )


def fetch_fused(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a fused checkpoint, downloaded to the Hub's cache if necessary.

    Only files that are used and not yet in the cache are downloaded; with HF_HUB_OFFLINE=1 all of
    them come from the cache.

    revision: branch, tag or commit of the repository.

    ValueError if there is no such checkpoint.
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
    with hub_errors_as_value_errors(repo):
        commit = root.name  # one commit for all files, even if a push comes in between
        templates = f"{CHAT_TEMPLATES}/*.jinja"
        snapshot_download(repo, revision=commit, allow_patterns=[f"{HEADS}/*", templates])
        snapshot_download(
            repo, revision=commit, allow_patterns=list(TARGET_FILES), ignore_patterns=["*/*"]
        )
    return root


def fetch_head(name: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a head, alone or in a fused checkpoint. Otherwise as `fetch_fused`."""
    found = _repository(name, revision)
    if found is None:
        inner = Path(name) / HEADS
        return inner if inner.is_dir() else Path(name)
    repo, revision = found
    root = _configs(repo, revision)
    fused = (root / HEADS / CONFIG).is_file()
    patterns = [f"{HEADS}/*"] if fused else [WEIGHTS, f"{ADAPTER}/*"]
    with hub_errors_as_value_errors(repo):
        snapshot_download(repo, revision=root.name, allow_patterns=patterns)
    return root / HEADS if fused else root


def _repository(name: str | Path, revision: str | None) -> tuple[str, str | None] | None:
    found = hub_name(name)
    if found is None:
        if revision is not None:
            raise ValueError(
                f"{name} is not a repository on the Hub (owner/name), so it has no revision "
                f"{revision}. Leave the revision out."
            )
        return None
    return found[0], revision or found[1]


def _configs(repo: str, revision: str | None) -> Path:
    """Download the configurations of a repository. ValueError if it holds no draft head."""
    with hub_errors_as_value_errors(repo):
        patterns = [CONFIG, f"{HEADS}/{CONFIG}"]
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    if not any(_holds_head(root / place) for place in (HEADS, ".")):
        raise ValueError(
            f"{repo} on the Hub{f' at {revision}' if revision else ''} holds no draft head of "
            f"Headstart: none of its {CONFIG} files has a section {OURS!r}. Check the name and the "
            "revision."
        )
    return root


def _holds_head(folder: Path) -> bool:
    file = folder / CONFIG
    return file.is_file() and head_section(file.read_bytes()) is not None


def head_section(config: bytes) -> dict[str, object] | None:
    """Return the section of a config.json about a draft head of ours, or None without one."""
    try:
        section = json.loads(config)[OURS]
    except (ValueError, KeyError, TypeError):
        return None
    return section if isinstance(section, dict) else None


def check_repo(name: str) -> None:
    """Raise ValueError if a name cannot be that of a repository with its owner."""
    hint = "Write owner/name, with your own user name or an organisation of yours as the owner."
    if name.count("/") != 1:
        raise ValueError(f"{name!r} is not the name of a repository: it has no owner. {hint}")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"{name!r} is not the name of a repository ({error}). {hint}") from error


@contextmanager
def hub_errors_as_value_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into a ValueError that names the way out."""
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
            f"There is no folder {repo}, and the Hub's cache lacks files of that repository, while "
            "HF_HUB_OFFLINE forbids the network. Unset it, or download the checkpoint once before."
        )
    return (
        f"The Hub ({constants.ENDPOINT}) could not be reached for {repo}: {error} Check the "
        "network, then run the same command again."
    )


def _refused(repo: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if status == 401:
        return (
            "The Hub does not know your token (HF_TOKEN, if set, takes precedence over the token "
            f"that `hf auth login` stored). {LOGIN}"
        )
    if status == 403:
        return (
            f"Your token may not write to {repo}: it has read access only, or the owner is neither "
            f"you nor an organisation of yours. {LOGIN}"
        )
    if status == 412:
        return f"{repo} was changed on the Hub in the meantime. Run the same command again."
    return f"The Hub refused ({repo}): {error.server_message or error}"
