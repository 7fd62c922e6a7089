"""Estimate memory and arithmetic of a training run before it starts.

Memory is counted from the shapes of target and head, which are built without weights; activations
are those that autograd saves on such a head. Time follows from the arithmetic and the share of a
GPU's peak that is reached, which is an assumption and can be set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headstart.model.heads.common.autoregressive import QUERY_CHUNK
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.lora import adapted
from headstart.model.target.output import TargetOutput
from headstart.model.target.target import Target
from headstart.model.target.weight_only import BITS
from headstart.model.target.weight_only import Kind as WeightOnly
from headstart.training.config.schema import Recipe
from headstart.training.objective.losses import chunk_rows, wide_numbers

SAMPLE = 16  # tokens of the measured forward pass: too few for attention to matter
FULL = 4  # bytes per number of the head's weights, gradients and moments
CONTEXT_GB = 0.8  # CUDA and its libraries on every GPU
SLACK = 1.1  # factor for the allocator
ATTENTION_COPIES = 2.5  # copies of a chunk's attention scores in the backward pass
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # keys in configurations
SHARDED = {  # tensors of the head that each engine shards
    "ddp": (),
    "fsdp2": ("weights", "gradients", "optimizer"),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights"),
}


@dataclass(frozen=True)
class GPU:
    """A kind of GPU. tflops: peak in dense bfloat16, by NVIDIA's data sheets.

    names: in CUDA. Variants with another peak (PCIe, NVL, parts of a GPU) have other names.
    """

    memory_gb: float
    tflops: float
    names: tuple[str, ...]


GPUS = {
    "a100-40gb": GPU(40, 312, ("A100-SXM4-40GB", "A100-PCIE-40GB")),
    "a100": GPU(80, 312, ("A100-SXM4-80GB", "A100 80GB PCIe")),
    "l40s": GPU(48, 362, ("L40S",)),
    "h100": GPU(80, 989, ("H100 80GB HBM3",)),
    "h200": GPU(141, 989, ("H200",)),
    "b200": GPU(180, 2250, ("B200",)),
}


def memory(recipe: Recipe, target: Target, head: DraftHead, processes: int) -> dict[str, float]:
    """Return bytes per GPU by purpose, at the peak of a step.

    target, head: without weights (on the meta device). `parallel.engine` must be resolved.
    """
    width = _bytes(recipe)
    tokens = max(recipe.data.global_batch_tokens / processes, recipe.data.max_length)
    # With tensor parallelism every process runs the global batch.
    together = recipe.parallel.target == "tensor_parallel"
    forward_tokens = max(recipe.data.global_batch_tokens, tokens) if together else tokens
    sharded = SHARDED[recipe.parallel.engine]
    numbers = sum(one.numel() for one in head.parameters())
    moments = _moments(recipe, head)
    head_parts = {"weights": numbers, "gradients": numbers, "optimizer": moments}
    found = {
        f"head: {name}": FULL * count / (processes if name in sharded else 1)
        for name, count in head_parts.items()
    }
    if width < FULL:  # autocast keeps a copy of the weights for the step
        found["head: weights as bfloat16"] = float(width * numbers)
    kept, at_work = _attention(recipe, head, tokens)
    found["head: kept for the backward pass"] = kept + tokens * kept_per_token(
        head, recipe, recompute=recipe.loss.recompute
    )
    found["target: weights"] = _target_bytes(recipe, target, processes, width)
    # Of the global batch, and of this rank's part while both exist.
    tokens_held = forward_tokens + tokens if together else tokens
    found["target: features"] = tokens_held * (len(head.taps) + 1) * target.hidden_size * width
    scores = 2 * FULL * recipe.data.max_length * getattr(target.config, "index_n_heads", 0)
    found["target: one layer at work"] = forward_tokens * (width * _widest(target) + scores)
    rows = min(recipe.loss.chunk_rows or chunk_rows(head, True), tokens)
    # Logits exist before the backward pass, the head's attention within it.
    found["logits, or a step going backward"] = max(rows * FULL * wide_numbers(head), at_work)
    found["gradient of the logits' input"] = tokens * recipe.loss.steps * target.hidden_size * width
    if recipe.joint is None:
        return found
    adapters, kept, again = _joint(recipe, target, width)
    found["adapters"], found["target: kept for the backward pass"] = adapters, tokens * kept
    # The target's backward pass follows the head's.
    backward = "logits, or a step going backward"
    return found | {backward: max(found[backward], tokens * again)}


def _joint(recipe: Recipe, target: Target, width: int) -> tuple[float, float, float]:
    """Return bytes of joint training: of the adapters with gradients and moments, of a token's
    activations in the target's layers, and of those that the backward pass recomputes."""
    config, layers = recipe.joint, len(target.layers)
    assert config is not None
    target.model.to(_dtype(width))
    wrapped = adapted(target.model, config.rank, config.alpha, config.modules)
    adapters = sum(one.numel() for one in wrapped.parameters() if one.requires_grad)
    ids_1T = torch.zeros(1, SAMPLE, dtype=torch.long, device="meta")
    lengths_1 = torch.full((1,), SAMPLE, device="meta")
    weights = [one.untyped_storage()._cdata for one in target.model.parameters()]
    with _saved(weights) as kept:
        output = target.forward_train(ids_1T, lengths_1)
    per_token = sum(kept.values()) / SAMPLE
    del output  # keeps the graph and its activations alive until here
    wrapped.unload()
    if not recipe.loss.recompute:
        return 4.0 * FULL * adapters, per_token, 0.0
    inputs = float(layers * width * target.hidden_size)
    return 4.0 * FULL * adapters, inputs, per_token / layers


def total_gb(parts: Mapping[str, float]) -> float:
    return CONTEXT_GB + SLACK * sum(parts.values()) / 1e9


def flops_per_token(recipe: Recipe, target: Target, head: DraftHead) -> float:
    """Return FLOP per token of the data, as if every token were a label: an upper bound."""
    return sum(_flops(recipe, target, head, passes=4 if recipe.loss.recompute else 3))


def _flops(recipe: Recipe, target: Target, head: DraftHead, *, passes: int) -> tuple[float, float]:
    """Return FLOP of a token, and the additional FLOP of a label. passes: over the head."""
    steps = recipe.loss.steps
    layers = 0 if recipe.data.features is not None else _active(target)
    if recipe.joint is not None:  # the original, the changed one, and the gradient of its input
        layers *= 3 + recipe.loss.recompute
    family = getattr(head.config, "family", None)
    inside = _multiplied(head, {} if family is None else family.settings)
    drafted = head.config.draft_vocab or head.config.vocab_size
    logits = target.hidden_size * (target.vocab_size + 2 * steps * drafted)
    return 2.0 * (layers + passes * steps * inside), 2.0 * logits


def peak(recipe: Recipe, target: Target) -> float | None:
    """Return the peak FLOP per second of this GPU, or None where it is not known: on a CPU, on a
    GPU that is not in `GPUS`, and where target or head compute in float32. The precision must be
    resolved."""
    halves = target.dtype in (torch.bfloat16, torch.float16)
    if target.device.type != "cuda" or not halves or recipe.train.precision != "bfloat16":
        return None
    name = torch.cuda.get_device_name(target.device).removeprefix("NVIDIA ")
    return next((1e12 * gpu.tflops for gpu in GPUS.values() if name in gpu.names), None)


class Throughput:
    """Metrics of speed: `tokens_per_second`, `tflops` and `mfu`.

    tflops counts the arithmetic per process as `headstart plan` does. mfu (arXiv 2204.02311) is a
    share of the GPU's peak and counts what the result needs: nothing that is recomputed, logits of
    labels only, and no attention scores.
    """

    def __init__(self, recipe: Recipe, target: Target, head: DraftHead, processes: int):
        self.flops, self.processes = flops_per_token(recipe, target, head), processes
        self.token, self.label = _flops(recipe, target, head, passes=3)
        self.peak = peak(recipe, target)

    def metrics(self, tokens: float, labels: float) -> dict[str, float]:
        """Return the metrics, given tokens and labels per second of all processes together."""
        tflops = tokens * self.flops / self.processes / 1e12
        metrics = {"tokens_per_second": tokens, "tflops": tflops}
        if self.peak is not None:
            useful = tokens * self.token + labels * self.label
            metrics["mfu"] = useful / self.processes / self.peak
        return metrics


def _attention(recipe: Recipe, head: DraftHead, tokens: float) -> tuple[float, float]:
    """Return bytes that grow with the square of the length, in later steps of the `append` layout:
    activations kept for the backward pass, and the peak within it with recomputation."""
    steps, recompute = recipe.loss.steps, recipe.loss.recompute
    per_token = kept_per_token(head, recipe, recompute=False)
    recomputed = tokens * per_token / steps if recompute else 0.0
    if getattr(head, "attention_layout", None) != "append" or steps == 1:
        return 0.0, recomputed
    length, heads = recipe.data.max_length, head.config.layer.num_attention_heads  # type: ignore[attr-defined]
    chunk = tokens / length * heads * min(length, QUERY_CHUNK) * (length + steps) * FULL
    kept = chunk if length <= QUERY_CHUNK else 0.0  # longer ones are always recomputed
    at_work = ATTENTION_COPIES * chunk + recomputed + (kept if recompute else 0.0)
    return (0.0 if recompute else (steps - 1) * kept), at_work


def kept_per_token(head: DraftHead, recipe: Recipe, *, recompute: bool) -> float:
    """Return the bytes of activations that autograd keeps per token, over all draft steps."""
    target = head.target
    head.recompute = recompute
    tokens_1T = torch.zeros(1, SAMPLE, dtype=torch.long, device="meta")
    dtype = _dtype(2 if recipe.train.precision == "bfloat16" else 4)
    shape = (1, SAMPLE, target.hidden_size)
    features = [torch.zeros(shape, dtype=dtype, device="meta") for _ in range(len(head.taps) + 1)]
    output = TargetOutput(None, features[-1], dict(zip(head.taps, features, strict=False)))
    weights = [one.untyped_storage()._cdata for one in head.to(dtype).parameters()]
    with _saved(weights) as kept:
        hidden = head.unroll(output, tokens_1T, recipe.loss.steps)
    assert hidden  # keeps the graph and its activations alive until here
    return sum(kept.values()) / SAMPLE


@contextmanager
def _saved(weights: Iterable[int]) -> Iterator[dict[int, int]]:
    """Record the bytes that autograd keeps, by storage. weights: storages to leave out."""
    kept: dict[int, int] = {}
    there = set(weights)

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in there:
            kept[storage._cdata] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield kept


def _moments(recipe: Recipe, head: DraftHead) -> int:
    """Return the numbers of optimizer state: two per weight, one for a matrix of Muon."""
    muon = recipe.train.optimizer == "muon"
    return sum(one.numel() * (1 if muon and one.dim() == 2 else 2) for one in head.parameters())


def _dtype(width: int) -> torch.dtype:
    return torch.float32 if width == FULL else torch.bfloat16


def _bytes(recipe: Recipe) -> int:
    """Return the bytes of a number of the target."""
    known = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
    return known[recipe.target.dtype]


def _target_bytes(recipe: Recipe, target: Target, processes: int, width: int) -> float:
    whole = sum(one.numel() for one in target.model.parameters())
    if recipe.target.quantize is not None:
        return _held_bytes(target, recipe.target.quantize, width)
    if recipe.parallel.target == "replicated":
        return float(width * whole)
    if recipe.parallel.target == "tensor_parallel":  # norms are replicated; they are small
        return width * (whole - _matrices(target) * (1 - 1 / processes))
    layers = [sum(one.numel() for one in layer.parameters()) for layer in target.layers]
    # Two layers are gathered at a time: the one that runs, and the next.
    return width * (whole - sum(layers) * (1 - 1 / processes) + 2 * max(layers))


def _held_bytes(target: Target, kind: WeightOnly, width: int) -> float:
    """Return the bytes of a quantized target and of its largest weight in full precision: one at a
    time is dequantized."""
    whole = sum(one.numel() for one in target.model.parameters())
    matrices = _matrices(target)
    largest = max(one.numel() for one in target.layers.parameters())
    return width * (whole - matrices + largest) + matrices * BITS[kind] / 8


def _matrices(target: Target) -> int:
    return sum(one.numel() for one in target.layers.parameters() if one.dim() > 1)


def _widest(target: Target) -> int:
    """Return the numbers per token within a layer: residual, norm, attention, and twice the MLP."""
    config: Any = target.config
    inner = getattr(config, "intermediate_size", None) or 4 * target.hidden_size
    return 8 * target.hidden_size + 2 * inner


def _active(target: Target) -> float:
    """Return the active weights per token of the layers: of experts only the routed ones."""
    settings = target.config.to_dict()
    return sum(_multiplied(layer, settings) for layer in target.layers)


def _multiplied(module: nn.Module, settings: Mapping[str, Any]) -> float:
    """Return the active weights per token. settings: of the family's configuration."""
    every = next((settings[name] for name in EXPERTS if settings.get(name)), None)
    chosen = settings.get("num_experts_per_tok")
    total = 0.0
    for name, one in module.named_parameters():
        part = chosen / every if every and chosen and ".experts." in f".{name}." else 1.0
        total += part * one.numel() if one.dim() > 1 else 0
    return total
