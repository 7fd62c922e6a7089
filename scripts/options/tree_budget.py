"""The option `--budget`: who guesses, and how much.

    auto         trees of as many nodes as pay on this machine (measured at first use)
    static       the best fixed tree for this head and machine, from the head's calibration
    12           always trees of 12 nodes (chains where the target has recurrent layers)
    12/5/4       the same with a greatest depth and a width
    off          the default tree, nothing measured
    lookup       no head: only guesses from the text itself

`+lookup` behind the others adds guesses from the text: `auto+lookup`.
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
    "auto, static, off, NODES, NODES/DEPTH/WIDTH or lookup; with +lookup, guesses from the text. "
    "Default: auto+lookup, on a GPU 16/5/4 (but auto+lookup where layers are recurrent)."
)
FORM = re.compile(r"(auto|static|off|\d+(/\d+/\d+)?)(\+lookup)?|lookup")


def check_budget(value: str | None) -> str | None:
    """For the option `--budget`."""
    return None if value is None else _checked(value)


def _checked(value: str) -> str:
    if FORM.fullmatch(value) is None:
        raise typer.BadParameter(
            f"{value!r} is none of auto, static, off, lookup, NODES and NODES/DEPTH/WIDTH (such as "
            "8/4/3), with or without +lookup."
        )
    if value[0].isdigit():
        try:
            _dynamic(value.partition("+")[0])
        except ValueError as wrong:  # the numbers make no tree
            raise typer.BadParameter(str(wrong)) from wrong
    return value


def check_budgets(values: list[str] | None) -> list[str]:
    return [_checked(value) for value in values or []]


def usual_budget(target: Target) -> str:
    """The budget that is used unless somebody says otherwise."""
    from headstart.inference.tree_policy.defaults import fixed_tree

    tree = fixed_tree(target)
    return "auto+lookup" if tree is None else f"{tree.nodes}/{tree.depth}/{tree.width}"


def contestants(
    target: Target, head: DraftHead, budgets: Sequence[str]
) -> dict[str, SpeculativeConfig]:
    """By name, in the order given; none given: the usual one."""
    budgets = budgets or [usual_budget(target)]
    return {
        f"{head.kind if budget != 'lookup' else 'own'} {budget}": contestant(target, head, budget)
        for budget in dict.fromkeys(budgets)
    }


def contestant(target: Target, head: DraftHead, budget: str | None = None) -> SpeculativeConfig:
    """ValueError for a static tree of a head that was never calibrated."""
    from headstart.inference.config import SpeculativeConfig
    from headstart.inference.engine.measure_costs import are_measured, measured_costs
    from headstart.inference.tree_policy.defaults import DEFAULT_TREE, WIDEST_TREE, for_target
    from headstart.model.tree.shape import TreeShape

    budget = budget or usual_budget(target)
    measured = budget == "lookup" or budget.startswith(("auto", "static"))
    if measured and not are_measured(target, head):
        show("Measuring once what a read costs on this machine: a few seconds.")
    widest = for_target(target, WIDEST_TREE)
    if budget == "lookup":
        return SpeculativeConfig(None, widest, costs=measured_costs(target, head), ngram=True)
    size, _, more = budget.partition("+")
    lookup = more == "lookup"
    if size == "auto":
        return SpeculativeConfig(head, widest, costs=measured_costs(target, head), ngram=lookup)
    if size == "off":
        return SpeculativeConfig(head, for_target(target, DEFAULT_TREE), ngram=lookup)
    if size.isdigit() and target.recurrent:
        return SpeculativeConfig(head, TreeShape.chain(int(size) - 1), ngram=lookup)
    shape = _static(target, head) if size == "static" else _dynamic(size)
    return SpeculativeConfig(head, shape, ngram=lookup)


def described(one: SpeculativeConfig) -> dict[str, Any]:
    """How a contestant guesses, for figures that are kept."""
    shape = one.shape
    assert shape is not None, "`contestant` names it"
    costs = {} if one.costs is None else {"costs": asdict(one.costs)}
    return {
        "nodes": shape.nodes,
        "depth": shape.depth,
        "width": shape.width,
        "static": shape.ranks is not None,
        "budget": "auto" if one.costs is not None else "off",
        "lookup": one.ngram,
        **costs,
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
            "The best static tree follows from how often each guess was right, and this head was "
            "never calibrated. Run `headstart calibrate` first, or take another --budget."
        )
    # A recurrent state cannot branch: only the likeliest guess of each depth is one.
    ranks = 1 if target.recurrent else None
    acceptance = [one[:ranks] for one in head.rank_acceptance]
    return fastest_static_tree(acceptance, measured_costs(target, head).step_seconds)
