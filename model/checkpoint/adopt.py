"""Make a head of kind mtp from the multi-token prediction layer that a checkpoint carries.

The names do not say whether the layer is a Llama layer or one of the target's family. Both are
tried with the weights of one of the target's layers, and must compute the same as that layer.

Legend: B sequences, T positions, D hidden size.
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
from .native_mtp import NativeMTP, find_native_mtp, load_native_mtp

PROBE_TOKENS = (5, 3, 7, 2, 6, 4, 1)


def adopt(source: str | Path, out: str | Path) -> mtp.Head:
    """Write the multi-token prediction layer of a checkpoint as the folder of a head.

    source: the checkpoint, as a folder or Hub id.
    out: the folder to write.

    Returns the head. ValueError if there is no such layer, or a head of kind mtp cannot hold it.
    """
    target = load_target(source)
    native = find_native_mtp(plain_source(str(source)), target.num_layers)
    head = make_head(target, mtp.Head.kind, _settings(target, native))
    assert isinstance(head, mtp.Head)
    load_native_mtp(head, native)
    save_head(head, out, HeadMeta(target=target.name, start=f"{target.name}: {native.prefix}*"))
    return head


def _settings(target: Target, native: NativeMTP) -> dict[str, Any]:
    last = target.num_layers - 1
    layout = native.layout
    settings: dict[str, Any] = {
        "feature_layer": last if layout.before_norm else None,
        "zero_centred": layout.zero_centred,
    }
    layer = mtp.DecoderLayer(LayerConfig(**layer_sizes(target)))
    names = {layout.layer + name for name in layer.state_dict()}
    if names <= native.files.keys() and _agrees(target, layer):
        return settings
    family = FamilyConfig.of(target.config)
    try:
        block = FamilyLayer(family)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(_unsupported(target, native, f" ({error})")) from error
    if not _agrees(target, block):
        raise ValueError(_unsupported(target, native))
    return settings | {"family": family.model_dump(mode="json")}


def _unsupported(target: Target, native: NativeMTP, why: str = "") -> str:
    return (
        f"The decoder layer in {native.prefix}* of {native.folder} is not supported: no layer of "
        f"{target.name} ({target.config.model_type}) computes the same as ours, so it cannot be "
        f"verified{why}. Train a head with `headstart train` instead."
    )


@torch.no_grad()
def _agrees(target: Target, layer: nn.Module) -> bool:
    """Whether a layer computes the same as one of the target's, with the weights of that one."""
    inner = layer.block if isinstance(layer, FamilyLayer) else layer
    layer.to(target.device)
    index = next(
        (at for at in reversed(range(target.num_layers)) if copy_layer(target, at, inner)), None
    )
    if index is None:
        return False
    count = len(PROBE_TOKENS)
    with override_topk(count, target.model):  # attend to all, as the head's layer does
        input_BTD, theirs_BTD = _layer_io(target, index)
    positions_BT = torch.arange(count, device=target.device)[None]
    causal = partial(grouped_attention, mask=None, causal=True)
    try:
        ours_BTD = layer.to(input_BTD.dtype)(input_BTD, positions_BT, causal)
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False  # the target's layer takes other arguments
    distance = float((ours_BTD - theirs_BTD).norm())
    tolerance = 1e-4 if target.dtype == input_BTD.dtype else 0.02  # 16-bit rotary angles
    # Relative to what the layer adds: relative to its output, the residual would hide errors.
    return distance <= tolerance * float((theirs_BTD - input_BTD).norm())


def _layer_io(target: Target, index: int) -> tuple[Tensor, Tensor]:
    """Input and output of a decoder layer for a few tokens, computed in at least float32."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    layer, wide = target.layers[index], torch.promote_types(target.dtype, torch.float32)
    ids_BT = torch.tensor([[one % target.vocab_size for one in PROBE_TOKENS]], device=target.device)
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        target.forward(ids_BT, logits=False)
    finally:
        handle.remove()
    args, kwargs = tree_map(partial(_widened, dtype=wide), calls[0])
    output = copy.deepcopy(layer).to(wide)(*args, **kwargs)
    first = args[0] if args else kwargs["hidden_states"]
    return first, output if isinstance(output, Tensor) else output[0]


def _widened(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
