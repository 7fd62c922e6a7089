"""A head of kind mtp from the multi-token prediction layer that a checkpoint already carries.

Whether the layer is a plain Llama layer or one of the target's family is not known by name: both
are filled with a layer of the target, and must compute what that one does.

Legend: B batch rows, T positions, D hidden size.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from headstart.model.backends.torch_ops import grouped_attention
from headstart.model.heads import mtp
from headstart.model.heads.common.base import make_head
from headstart.model.heads.common.borrow import copy_layer, layer_sizes
from headstart.model.heads.common.layers import LayerConfig
from headstart.model.heads.common.target_layer import FamilyConfig, FamilyLayer
from headstart.model.target.load import load_target
from headstart.model.target.sparse_attention import override_topk
from headstart.model.target.target import Target

from .fuse import plain_source
from .head import save_head
from .metadata import HeadMeta
from .native_mtp import NativeMTP, find, read_into

TEXT = (5, 3, 7, 2, 6, 4, 1)


def adopt(source: str | Path, out: str | Path) -> mtp.Head:
    """Write the layer of a checkpoint (a folder or a Hub id) as a head's folder; returns the head.

    ValueError where there is none, or one that a head of kind mtp cannot hold.
    """
    target = load_target(source)
    published = find(plain_source(str(source)), target.num_layers)
    head = make_head(target, mtp.Head.kind, _settings(target, published))
    assert isinstance(head, mtp.Head)
    read_into(head, published)
    save_head(head, out, HeadMeta(target=target.name, start=f"{target.name}: {published.prefix}*"))
    return head


def _settings(target: Target, published: NativeMTP) -> dict[str, Any]:
    last = target.num_layers - 1
    layout = published.layout
    settings: dict[str, Any] = {
        "feature_layer": last if layout.before_norm else None,
        "zero_centred": layout.zero_centred,
    }
    layer = mtp.DecoderLayer(LayerConfig(**layer_sizes(target)))
    names = {layout.layer + name for name in layer.state_dict()}
    if names <= published.files.keys() and _agrees(target, layer):
        return settings
    family = FamilyConfig.of(target.config)
    try:
        block = FamilyLayer(family)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(_unlike(target, published, f" ({error})")) from error
    if not _agrees(target, block):
        raise ValueError(_unlike(target, published))
    return settings | {"family": family.model_dump(mode="json")}


def _unlike(target: Target, published: NativeMTP, why: str = "") -> str:
    return (
        f"The decoder layer in {published.prefix}* of {published.folder} cannot be computed: none "
        f"of the layers of {target.name} ({target.config.model_type}) is like it, so there is "
        f"nothing to hold it to{why}. Train a head with `headstart train` instead."
    )


@torch.no_grad()
def _agrees(target: Target, layer: nn.Module) -> bool:
    """Whether a layer with the weights of one of the target's computes what that one does."""
    inner = layer.block if isinstance(layer, FamilyLayer) else layer
    layer.to(target.device)
    index = next(
        (at for at in reversed(range(target.num_layers)) if copy_layer(target, at, inner)), None
    )
    if index is None:
        return False
    with override_topk(len(TEXT), target.model):  # all of them, as the head's layer does
        given_BTD, theirs_BTD = _seen_by(target, index)
    positions_BT = torch.arange(len(TEXT), device=target.device)[None]
    causal = partial(grouped_attention, mask=None, causal=True)
    try:
        ours_BTD = layer.to(given_BTD.dtype)(given_BTD, positions_BT, causal)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False  # it takes other arguments than those of the known layers
    off = float((ours_BTD - theirs_BTD).norm())
    tolerance = 1e-4 if target.dtype == given_BTD.dtype else 0.02  # of rotary angles in 16 bits
    # Measured by what the layer adds: its input alone would hide much.
    return off <= tolerance * float((theirs_BTD - given_BTD).norm())


def _seen_by(target: Target, index: int) -> tuple[Tensor, Tensor]:
    """What goes into a decoder layer on a short text, and what it makes of it in full precision."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer, wide = target.layers[index], torch.promote_types(target.dtype, torch.float32)
    ids_BT = torch.tensor([[one % target.vocab_size for one in TEXT]], device=target.device)
    handle = layer.register_forward_pre_hook(
        lambda _, given, named: seen.append((given, named)), with_kwargs=True
    )
    try:
        target.forward(ids_BT, logits=False)
    finally:
        handle.remove()
    given, named = tree_map(partial(_widened, dtype=wide), seen[0])
    output = copy.deepcopy(layer).to(wide)(*given, **named)
    first = given[0] if given else named["hidden_states"]
    return first, output if isinstance(output, Tensor) else output[0]


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
