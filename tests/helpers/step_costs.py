"""Shared by tests: step costs."""

from __future__ import annotations

from headstart.inference.tree_policy.cost_model import Costs


def costs(per_node: float, advance: float = 0.1, deepen: float = 0.1) -> Costs:
    """An autoregressive step is one second."""
    nodes = (1, 4, 16, 64)
    verify = tuple(1 + per_node * (count - 1) for count in nodes)
    return Costs(nodes, verify, advance=advance, deepen=deepen, rest=0.0)


FREE, USUAL, DEAR = costs(0.0), costs(0.1), costs(1.0)
