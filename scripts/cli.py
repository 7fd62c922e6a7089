"""The `headstart` command: each subcommand is a function in `scripts/commands/`."""

from __future__ import annotations

import typer

from headstart.scripts.commands.adopt import adopt
from headstart.scripts.commands.bench import bench
from headstart.scripts.commands.cache_hidden_states import features
from headstart.scripts.commands.calibrate import calibrate
from headstart.scripts.commands.demo import demo
from headstart.scripts.commands.evaluate import evaluate
from headstart.scripts.commands.export import export
from headstart.scripts.commands.fuse import fuse
from headstart.scripts.commands.generate import generate
from headstart.scripts.commands.generate_data import data
from headstart.scripts.commands.graft import graft
from headstart.scripts.commands.inspect import inspect_data, inspect_head
from headstart.scripts.commands.plan import plan
from headstart.scripts.commands.push import push
from headstart.scripts.commands.serve import serve
from headstart.scripts.commands.train import train
from headstart.scripts.console import KEPT, friendly

app = typer.Typer(
    help="Train draft heads on a frozen language model, fuse both, and decode exactly with a tree.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
inspect = typer.Typer(help="Show what data files and checkpoints contain.", no_args_is_help=True)

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
