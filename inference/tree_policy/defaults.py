"""Default tree shapes."""

from __future__ import annotations

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

# Small enough to pay on a CPU, where each node costs a quarter of an autoregressive step.
DEFAULT_TREE = TreeShape.dynamic(nodes=8, depth=4, width=3)
# With the adaptive policy: as much as can pay on any machine, of which the policy takes a part.
WIDEST_TREE = TreeShape.dynamic(nodes=64, depth=8, width=4)
# With CUDA graphs, where 16 nodes are verified in little more time than one. The adaptive policy,
# which there sizes a tree by the scores of the one before, was slower (docs/benchmarks.md).
GPU_TREE = TreeShape.dynamic(nodes=16, depth=5, width=4)


def for_target(target: Target, shape: TreeShape) -> TreeShape:
    """A default shape as the target supports it: recurrent layers cannot verify branches, so there
    it is a chain of the same depth."""
    return TreeShape.chain(shape.depth) if target.recurrent else shape


def fixed_tree(target: Target) -> TreeShape | None:
    """The default tree on a GPU.

    None elsewhere and for recurrent targets: there the default is the adaptive policy with n-gram
    drafts.
    """
    return GPU_TREE if target.device.type == "cuda" and not target.recurrent else None


def clamp_to_head(shape: TreeShape, head: DraftHead) -> TreeShape:
    """The shape, no deeper than the head can draft.

    ValueError for branches on a recurrent target, and for more children than the head has tokens.
    """
    if head.target.recurrent and shape.width > 1:
        raise ValueError(
            f"The tree has branches (width {shape.width}), and {head.target.name} has recurrent "
            f"layers, whose state cannot branch. Use a chain: TreeShape.chain({shape.depth}), or "
            f"--budget {shape.depth + 1}/{shape.depth}/1."
        )
    known = head.config.draft_vocab or head.config.vocab_size
    if shape.width > known:
        raise ValueError(
            f"The tree asks for {shape.width} draft tokens after one node, but the head knows only "
            f"{known} tokens. Make the tree narrower."
        )
    return shape if head.max_depth is None else shape.limited(head.max_depth)
