"""Which trees are used unless somebody says otherwise."""

from __future__ import annotations

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

# Small enough to pay on a CPU, where every node costs a quarter of a step.
DEFAULT_TREE = TreeShape.dynamic(nodes=8, depth=4, width=3)
# With a budget: as much as can pay on any machine; the budget takes the part that does.
WIDEST_TREE = TreeShape.dynamic(nodes=64, depth=8, width=4)
# Where rounds are CUDA graphs, in which 16 nodes are read in little more time than one. A budget,
# which sizes a tree by the scores of the one before there, was slower (docs/benchmarks.md).
GPU_TREE = TreeShape.dynamic(nodes=16, depth=5, width=4)


def usual(target: Target, shape: TreeShape) -> TreeShape:
    """A shape that nobody asked for, as the target can read it: recurrent layers read no branches,
    so there it is a chain as deep."""
    return TreeShape.chain(shape.depth) if target.recurrent else shape


def fixed_tree(target: Target) -> TreeShape | None:
    """The tree that is used on a GPU unless somebody says otherwise. None elsewhere, and where
    layers are recurrent: a budget sizes trees there, and guesses come from the text too."""
    return GPU_TREE if target.device.type == "cuda" and not target.recurrent else None


def fitting(shape: TreeShape, head: DraftHead) -> TreeShape:
    """The shape as deep as the head can draft. ValueError if it asks for more than it knows."""
    if not isinstance(shape, TreeShape):
        raise ValueError(
            f"A tree is given as a TreeShape, got {shape!r}. For example TreeShape.chain(4)."
        )
    if head.target.recurrent and shape.width > 1:
        raise ValueError(
            f"The tree has branches (width {shape.width}), and {head.target.name} has recurrent "
            f"layers, whose state cannot branch. Use a chain: TreeShape.chain({shape.depth}), or "
            f"--budget {shape.depth + 1}/{shape.depth}/1."
        )
    known = head.config.draft_vocab or head.config.vocab_size
    if shape.width > known:
        raise ValueError(
            f"The tree asks for {shape.width} guesses at one place, but the head knows only "
            f"{known} tokens. Make the tree narrower."
        )
    return shape if head.max_depth is None else shape.limited(head.max_depth)
