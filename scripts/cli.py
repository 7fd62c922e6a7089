"""The `headstart` command. Each command is a function in a file of its own."""

from __future__ import annotations

import typer

from .adopt import adopt
from .bench import bench
from .calibrate import calibrate
from .data import data
from .demo import demo
from .evaluate import evaluate
from .export import export
from .features import features
from .fuse import fuse
from .generate import generate
from .graft import graft
from .inspect_ import inspect_data, inspect_head
from .plan import plan
from .push import push
from .serve import serve
from .train import train
from .ui import KEPT, friendly

app = typer.Typer(
    help="Train draft heads on a frozen language model, fuse both, and decode exactly with a tree.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
inspect = typer.Typer(help="Look into data and checkpoints.", no_args_is_help=True)

app.command()(friendly(demo, KEPT))
app.command()(friendly(data, KEPT))
app.command()(friendly(features, KEPT))
app.command()(friendly(plan))
app.command()(friendly(train))
app.command()(friendly(adopt))
app.command()(friendly(fuse))
app.command()(friendly(export))
app.command()(friendly(graft))
app.command()(friendly(push, KEPT))
app.command()(friendly(generate))
app.command()(friendly(serve))
app.command("eval")(friendly(evaluate))
app.command()(friendly(bench))
app.command()(friendly(calibrate))
inspect.command("data")(friendly(inspect_data))
inspect.command("head")(friendly(inspect_head))
app.add_typer(inspect, name="inspect")


def main() -> None:
    app()


if __name__ == "__main__":
    main()
