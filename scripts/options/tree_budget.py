"""The option `--budget`: where draft tokens come from, and how many are verified per decode step.

    auto         as many nodes as pay on this machine (step costs are measured at first use)
    static       the fastest fixed tree for this head and machine, from the head's calibration
    12           trees of 12 nodes (chains where the target has recurrent layers)
    12/5/4       trees of at most 12 nodes, depth 5 and width 4
    off          the default tree, nothing measured
    ngram        no head: only n-gram (prompt-lookup) drafts

`+ngram` behind the others adds n-gram drafts: `auto+ngram`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

from headstart.scripts.console import show

if TYPE_CHECKING:
    from headstart.inference.config import SpeculativeConfig
    from headstart.model.heads.common.base import DraftHead
    from headstart.model.target.target import Target
    from headstart.model.tree.shape import TreeShape

HELP = (
    "Nodes of the draft trees: auto, static, off, NODES, NODES/DEPTH/WIDTH or ngram; +ngram adds "
    "n-gram drafts (default: auto+ngram; on a GPU 16/5/4, except for recurrent targets)."
)
FORM = re.compile(r"(auto|static|off|\d+(/\d+/\d+)?)(\+ngram)?|ngram")


def check_budget(value: str | None) -> str | None:
    """Callback of the option `--budget`."""
    return None if value is None else _checked(value)


def check_budgets(values: list[str] | None) -> list[str]:
    """Callback of an option `--budget` that can be given several times."""
    return [_checked(value) for value in values or []]


def _checked(value: str) -> str:
    if "lookup" in value:
        raise typer.BadParameter(
            f"{value!r}: n-gram drafts are called ngram now: {value.replace('lookup', 'ngram')}."
        )
    if FORM.fullmatch(value) is None:
        raise typer.BadParameter(
            f"{value!r} is none of auto, static, off, ngram, NODES and NODES/DEPTH/WIDTH (such as "
            "8/4/3), with or without +ngram."
        )
    if value[0].isdigit():
        try:
            _dynamic(value.partition("+")[0])
        except ValueError as error:  # the numbers make no tree
            raise typer.BadParameter(str(error)) from error
    return value


def default_budget(target: Target) -> str:
    """The budget if none is given."""
    from headstart.inference.tree_policy.defaults import fixed_tree

    tree = fixed_tree(target)
    return "auto+ngram" if tree is None else f"{tree.nodes}/{tree.depth}/{tree.width}"


def speculative_configs(
    target: Target, head: DraftHead, budgets: Sequence[str]
) -> dict[str, SpeculativeConfig]:
    """Configurations by name, in the order given; the default one if none is given."""
    budgets = budgets or [default_budget(target)]
    configs = [speculative_config(target, head, budget) for budget in dict.fromkeys(budgets)]
    return {config.name: config for config in configs}


def speculative_config(
    target: Target, head: DraftHead, budget: str | None = None
) -> SpeculativeConfig:
    """The configuration of a `--budget`, named for tables.

    Raises ValueError for a static tree of a head that was never calibrated.
    """
    from headstart.inference.config import SpeculativeConfig
    from headstart.inference.engine.measure_costs import are_measured, measured_costs
    from headstart.inference.tree_policy.defaults import DEFAULT_TREE, WIDEST_TREE, for_target
    from headstart.model.tree.shape import TreeShape

    budget = budget or default_budget(target)
    size, _, _ = budget.partition("+")
    ngram = budget.endswith("ngram")
    drafts = None if size == "ngram" else head
    name = f"{'' if drafts is None else head.kind + ' '}{budget}"
    if size in ("auto", "static", "ngram") and not are_measured(target, head):
        show("Measuring the costs of a decode step on this machine, once: a few seconds.")
    if size in ("auto", "ngram"):
        widest, costs = for_target(target, WIDEST_TREE), measured_costs(target, head)
        return SpeculativeConfig(drafts, widest, costs=costs, ngram=ngram, name=name)
    if size == "off":
        shape = for_target(target, DEFAULT_TREE)
    elif size == "static":
        shape = _static(target, head)
    elif size.isdigit() and target.recurrent:
        shape = TreeShape.chain(int(size) - 1)
    else:
        shape = _dynamic(size)
    return SpeculativeConfig(drafts, shape, ngram=ngram, name=name)


def describe(config: SpeculativeConfig) -> dict[str, Any]:
    """A configuration as JSON, for reports."""
    shape = config.shape
    assert shape is not None  # `speculative_config` always sets it
    return {
        "nodes": shape.nodes,
        "depth": shape.depth,
        "width": shape.width,
        "static": shape.ranks is not None,
        "budget": "off" if config.costs is None else "auto",
        "ngram": config.ngram,
        **({} if config.costs is None else {"costs": asdict(config.costs)}),
    }


def _dynamic(size: str) -> TreeShape:
    from headstart.inference.tree_policy.defaults import DEFAULT_TREE
    from headstart.model.tree.shape import TreeShape

    nodes, *rest = (int(part) for part in size.split("/"))
    depth, width = rest or (DEFAULT_TREE.depth, DEFAULT_TREE.width)
    return TreeShape.dynamic(nodes, depth, width)


def _static(target: Target, head: DraftHead) -> TreeShape:
    from headstart.inference.engine.measure_costs import measured_costs
    from headstart.inference.tree_policy.static import fastest_static_tree

    if not head.rank_acceptance:
        raise ValueError(
            "A static tree needs the acceptance rate of each draft rank, and this head was never "
            "calibrated. Run `headstart calibrate` first, or choose another --budget."
        )
    # A recurrent state cannot branch: its trees have only the top-1 candidate of each depth.
    ranks = 1 if target.recurrent else None
    acceptance = [one[:ranks] for one in head.rank_acceptance]
    return fastest_static_tree(acceptance, measured_costs(target, head).step_seconds)
