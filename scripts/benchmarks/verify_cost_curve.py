"""The cost of verifying a tree of N nodes behind a context, on which the choice of trees depends.

    python -m headstart.scripts.benchmarks.verify_cost_curve TARGET --context 1k,8k
    python -m headstart.scripts.benchmarks.verify_cost_curve config.json ...  (random weights)

Times the model's own modules, Headstart's fused backend and, on CUDA, both as CUDA graphs, one
after the other for every number of nodes. Prints a table, then machine, versions and metrics as one
line of JSON.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.model.target.load import load_target, wrap_target
from headstart.scripts.console import friendly, show
from headstart.scripts.options.environment import environment, memory_speed
from headstart.scripts.options.parse import parse_sizes

if TYPE_CHECKING:
    from headstart.model.target.target import Target
    from headstart.model.tree.tree import Tree

CHILDREN = 3  # per node of the trees
SECONDS = 0.2  # per measurement, of at least five passes
MODES = ("modules", "fused", "modules graph", "fused graph")


def verify_cost_curve(
    target: Annotated[
        str,
        typer.Argument(
            help="Target: Hub id, folder, .gguf file, or a config.json for random weights."
        ),
    ],
    context: Annotated[str, typer.Option(help="Context lengths in tokens, e.g. 1k,8k.")] = "1k",
    nodes: Annotated[str, typer.Option(help="Numbers of nodes.")] = "1,2,4,8,16,32,64,128,256",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Time the verification of trees behind a context."""
    contexts, counts = parse_sizes(context, "--context"), parse_sizes(nodes, "--nodes")
    opened, curve = _open(target, dtype), []
    if opened.recurrent:
        raise ValueError(
            f"{opened.name} has recurrent layers, whose state cannot branch, so it verifies no "
            "trees. Name another target."
        )
    speed = memory_speed(opened)
    for tokens in contexts:
        for count in counts:
            times = verify_times(opened, tokens, count)
            curve.append({"context": tokens, "nodes": count, "ms": times})
            shown = "  ".join(f"{mode} {value:.3f}" for mode, value in times.items())
            show(f"{tokens} tokens, {count} nodes, ms: {shown}")
    print(json.dumps({"target": target, **environment(opened), **speed, "curve": curve}))


def _open(name: str, dtype: str) -> Target:
    from headstart.model.target.synthetic import of_shape

    if name.endswith(".json"):
        return wrap_target(of_shape(Path(name), dtype))
    return load_target(name, dtype=dtype)


def verify_times(target: Target, tokens: int, count: int) -> dict[str, float]:
    """Milliseconds per forward pass over a tree of `count` nodes behind `tokens`, by mode."""
    import torch

    from headstart.inference.engine.cuda_graph import CapturedFunction
    from headstart.inference.engine.graph_runner import MIN_CAPACITY

    tree, backend = _tree(target, count), target.backend
    growing, capacity = target.new_cache(1), MIN_CAPACITY
    while capacity < tokens + count:
        capacity *= 2
    ids_1T = torch.arange(tokens, device=target.device)[None] * 31 % target.vocab_size
    target.forward(ids_1T, growing, logits=False)
    growing.commit(None, torch.tensor([tokens], device=target.device))
    fixed = target.new_cache(1)
    fixed.preallocate(capacity)
    fixed.copy_from(growing)
    times: dict[str, float] = {}
    try:
        for mode in MODES:
            replayed = mode.endswith("graph")
            if replayed and target.device.type != "cuda":
                continue
            target.backend = backend if mode.startswith("fused") else None
            cache = fixed if replayed else growing

            def verify(cache: Any = cache) -> None:
                with torch.no_grad():
                    target.forward(tree, cache)

            pool = torch.cuda.graph_pool_handle() if replayed else None
            call = CapturedFunction(verify, target.device, pool) if replayed else verify
            times[mode] = round(1e3 * _seconds(call, target), 4)
    finally:
        target.backend = backend
    return times


def _tree(target: Target, count: int) -> Tree:
    import torch

    from headstart.model.tree.tree import Tree

    own_1N = torch.arange(count, device=target.device)[None]
    parents_1N = torch.where(own_1N > 0, (own_1N - 1) // CHILDREN, -1)
    return Tree(own_1N % target.vocab_size, parents_1N, -own_1N.float())


def _seconds(call: Callable[[], None], target: Target) -> float:
    """Median seconds of a call."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter() - start

    for _ in range(3):
        once()
    seconds: list[float] = []
    while len(seconds) < 5 or sum(seconds) < SECONDS:
        seconds.append(once())
    return sorted(seconds)[len(seconds) // 2]


if __name__ == "__main__":
    typer.run(friendly(verify_cost_curve))
