"""Terminal output of the commands: progress bars, coloured streams, errors without tracebacks."""

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

# Errors whose message is for users: what, why and what to do.
USER_ERRORS = (ValueError, FloatingPointError, MemoryError)
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT = "Finished work is kept; the same command resumes from there."
UNCHANGED = "Nothing was changed."
INTERRUPTED = 130  # the shell's exit status for Ctrl-C


class Update(Protocol):
    """Update a progress bar: the amount done, a note behind the bar, a new total."""

    def __call__(self, done: int, note: str = "", total: int | None = None) -> None: ...


@contextmanager
def progress(title: str, total: int | None) -> Iterator[Update]:
    """A progress bar with elapsed and remaining time. total: None if unknown."""
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
    """Print a text with markup; pass text of users through `escape`, or print it with `show`."""
    console.print(text)


def show(text: str) -> None:
    """Print a text as it is, without markup and wrapping."""
    console.print(text, markup=False, soft_wrap=True)


def report_kept_card(written: bool, folder: Path) -> None:
    """Report a model card that was edited by hand and therefore lacks the new metrics."""
    if not written:
        show(
            f"{folder / 'README.md'} was edited by hand and is not changed. Remove it and run the "
            "command again to write one with the new metrics."
        )


# Colours of a streamed response by the tokens of a decode step: the more, the warmer.
STEP_STYLES = ("dim", "green", "cyan", "yellow", "magenta", "bold red")


def coloured(text: str, tokens: int) -> Text:
    """Text of one decode step, in the colour of its number of tokens."""
    return Text(text, style=STEP_STYLES[min(tokens, len(STEP_STYLES)) - 1])


def legend() -> Text:
    """The meaning of the colours."""
    text = Text("tokens per step: ")
    for tokens, style in enumerate(STEP_STYLES, start=1):
        more = "+" if tokens == len(STEP_STYLES) else ""
        text.append(f" {tokens}{more} ", style=style)
    return text


def check_top_p(value: float | None) -> float | None:
    """Callback of the option `--top-p`: typer's own ranges cannot exclude 0."""
    if value is not None and not 0 < value <= 1:
        raise typer.BadParameter(f"{value} is out of range: give more than 0 and at most 1.")
    return value


def friendly(command: Callable[P, None], stopped: str = UNCHANGED) -> Callable[P, None]:
    """Wrap a command: user errors print a message and exit with status 2, Ctrl-C with 130.

    stopped: the message after Ctrl-C, unless the command gives one.
    HEADSTART_DEBUG=1 in the environment shows tracebacks instead.
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
        except USER_ERRORS as error:
            _fail(str(error))
        except BrokenPipeError:
            raise  # the reader of a pipe closed it: typer exits quietly
        except OSError as error:
            _fail(_system_error(error, error.errno))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            _fail(_system_error(error, int(number[1])))

    return wrapped


def _system_error(error: Exception, number: int | None) -> str:
    """The message for an error of the operating system. number: its errno; None for errors that
    Headstart raised itself."""
    if number is None:
        return str(error)
    if number in DISK_FULL:
        return (
            f"The disk is full: {error}. Files that were complete before are untouched. "
            "Free some space and run the same command again."
        )
    advice = {
        errno.ENOENT: "Check the path.",
        errno.EEXIST: "Choose another path, or remove the existing one.",
        errno.ENOTDIR: "A part of the path is a file: choose another path.",
        errno.EISDIR: "Name a file, not a folder.",
        errno.EACCES: "Change the permissions, or choose another path.",
        errno.EPERM: "Change the permissions, or choose another path.",
        errno.EROFS: "Choose a path that can be written to.",
    }
    general = "Check the path, the disk and the network, then run the same command again."
    return f"The operating system reported: {error}. {advice.get(number, general)}"


def _fail(message: str) -> None:
    errors.print(Panel(Text(message), title="headstart", title_align="left", border_style="red"))
    sys.exit(2)
