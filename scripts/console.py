"""What the commands show: bars, coloured streams, and mistakes without tracebacks."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, Protocol

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from safetensors import SafetensorError

P = ParamSpec("P")
console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

# Errors whose message is made for users: what, why and what to do.
MISTAKES = (ValueError, FloatingPointError, MemoryError)
FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT = "What was finished is kept; the same command goes on from there."
UNCHANGED = "Nothing was changed."
INTERRUPTED = 130  # the shell's exit status for Ctrl-C


class Update(Protocol):
    """Tell a bar how much is done, what to write behind it, and a new total."""

    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Update]:
    """A bar with elapsed and remaining time."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, note="")

        def update(done: int, note: str = "", total: int | None = total) -> None:
            bars.update(task, completed=done, note=note, total=total)

        yield update


def say(text: str) -> None:
    """Our own words, with markup; what comes from users goes through `escape` or `show`."""
    console.print(text)


def show(text: str) -> None:
    """A text as it is: no markup, and no line break that it does not have."""
    console.print(text, markup=False, soft_wrap=True)


def tell_kept_card(written: bool, folder: Path) -> None:
    """Say that a checkpoint's card was edited by hand, and does not show the new figures."""
    if not written:
        show(
            f"{folder / 'README.md'} was edited by hand and is left as it is. Remove it and run "
            "this again to have one written with the new figures."
        )


# Colours of a streamed answer by how many tokens one step accepted: more tokens, warmer colour.
STEP_STYLES = ("dim", "green", "cyan", "yellow", "magenta", "bold red")


def coloured(text: str, tokens: int) -> Text:
    """Text that one step gave, in the colour of its number of tokens."""
    return Text(text, style=STEP_STYLES[min(tokens, len(STEP_STYLES)) - 1])


def legend() -> Text:
    text = Text("tokens per step: ")
    for tokens, style in enumerate(STEP_STYLES, start=1):
        more = "+" if tokens == len(STEP_STYLES) else ""
        text.append(f" {tokens}{more} ", style=style)
    return text


def check_top_p(value: float | None) -> float | None:
    """For the option `--top-p`, whose own range cannot leave out 0."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} leaves no token: give more than 0 and at most 1.")
    return value


def friendly(command: Callable[P, None], stopped: str = UNCHANGED) -> Callable[P, None]:
    """A user's mistake ends in a message (what, why, what to do), Ctrl-C in exit status 130.

    stopped: what to say of the work after Ctrl-C, where the command itself does not say it.
    HEADSTART_DEBUG=1 shows tracebacks all the same.
    """

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if os.environ.get("HEADSTART_DEBUG"):
            return command(*args, **kwargs)
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            note = f"\nStopped. {str(stop) or stopped}"
            errors.print(note, style="yellow", markup=False, soft_wrap=True)
            sys.exit(INTERRUPTED)
        except MISTAKES as mistake:
            _fail(str(mistake))
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: typer ends quietly
        except OSError as trouble:
            _fail(_told(trouble, trouble.errno))
        except SafetensorError as trouble:
            number = re.search(r"os error (\d+)", str(trouble))
            if number is None:
                raise
            _fail(_told(trouble, int(number[1])))

    return wrapped


def _told(trouble: Exception, number: int | None) -> str:
    """What the system refused, and what to do. number: its errno; None for our own messages."""
    if number is None:
        return str(trouble)
    if number in FULL:
        return (
            f"The disk is full: {trouble}. Files that were complete before are untouched. "
            "Free some space and run the same command again."
        )
    advice = {
        errno.ENOENT: "Check the path.",
        errno.EEXIST: "Choose another place, or remove what is there.",
        errno.ENOTDIR: "A part of the path is a file: choose another place.",
        errno.EISDIR: "Name a file, not a folder.",
        errno.EACCES: "Change the permissions, or choose another place.",
        errno.EPERM: "Change the permissions, or choose another place.",
        errno.EROFS: "Choose a place that can be written to.",
    }
    general = "Check the path, the disk and the network, then run the same command again."
    return f"The system refused: {trouble}. {advice.get(number, general)}"


def _fail(message: str) -> None:
    errors.print(Panel(Text(message), title="headstart", title_align="left", border_style="red"))
    sys.exit(2)
