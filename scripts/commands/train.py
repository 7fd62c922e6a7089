"""`headstart train`: train a draft head by a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from headstart.scripts.console import show
from headstart.scripts.options.common import Overrides, RecipeName
from headstart.scripts.options.recipe import find_recipe, run_recipe


def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    explain: Annotated[
        bool,
        typer.Option(help="Print the resolved recipe with the meaning of every setting, and stop."),
    ] = False,
) -> None:
    """Train a head. Ctrl-C saves; train.resume=true resumes."""
    from headstart.training.config import explain as explaining
    from headstart.training.config.schema import load_recipe

    resolved = load_recipe(find_recipe(recipe), overrides or [])
    if explain:
        show(explaining.explain(resolved))
        return
    run_recipe(resolved)
