"""What a read of N nodes costs behind a text: the curve that every choice of a tree depends on.

    python -m headstart.scripts.benchmarks.verify_cost_curve TARGET --context 1k,8k
    python -m headstart.scripts.benchmarks.verify_cost_curve config.json ...  (that shape)

Three ways, one after the other for every count: the model's own modules, our shorter way, and on
CUDA both played back as graphs. Prints a table, then machine, versions and figures in one line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headstart.model.target.load import load_target, wrap_target
from headstart.scripts.commands.bench import machine
from headstart.scripts.commands.evaluate import conditions
from headstart.scripts.console import friendly, show
from headstart.scripts.options.suites import numbers

if TYPE_CHECKING:
    from headstart.model.target.target import Target
    from headstart.model.tree.tree import Tree

CHILDREN = 3  # of a node of the trees that are read
SECONDS = 0.2  # that each figure is measured for, at least five times
WAYS = ("modules", "ours", "modules replayed", "ours replayed")


def curve(
    target: Annotated[str, typer.Argument(help="Hub id, folder, .gguf file or config.json.")],
    context: Annotated[str, typer.Option(help="Tokens in front, e.g. 1k,8k.")] = "1k",
    nodes: Annotated[str, typer.Option(help="Counts of nodes.")] = "1,2,4,8,16,32,64,128,256",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Time reads of trees behind a text."""
    contexts, counts = numbers(context, "--context"), numbers(nodes, "--nodes")
    opened, figures = _opened(target, dtype), []
    if opened.recurrent:
        raise ValueError(
            f"{opened.name} has recurrent layers, whose state cannot branch, and trees are timed "
            "here. Name another target."
        )
    facts = machine(opened)
    for tokens in contexts:
        for count in counts:
            took = timed(opened, tokens, count)
            figures.append({"context": tokens, "nodes": count, "ms": took})
            shown = "  ".join(f"{way} {value:.3f}" for way, value in took.items())
            show(f"{tokens} tokens, {count} nodes, ms: {shown}")
    print(json.dumps({"target": target, **conditions(opened), **facts, "curve": figures}))


def _opened(name: str, dtype: str) -> Target:
    from headstart.model.target.synthetic import of_shape

    if name.endswith(".json"):
        return wrap_target(of_shape(Path(name), dtype))
    return load_target(name, dtype=dtype)


def timed(target: Target, tokens: int, count: int) -> dict[str, float]:
    """Milliseconds per read, by way."""
    import torch

    from headstart.inference.engine.cuda_graph import CapturedFunction
    from headstart.inference.engine.graph_runner import MIN_CAPACITY

    tree, shorter = _tree(target, count), target.backend
    growing, capacity = target.new_cache(1), MIN_CAPACITY
    while capacity < tokens + count:
        capacity *= 2
    ids_1T = torch.arange(tokens, device=target.device)[None] * 31 % target.vocab_size
    target.forward(ids_1T, growing, logits=False)
    growing.commit(None, torch.tensor([tokens], device=target.device))
    fixed = target.new_cache(1)
    fixed.preallocate(capacity)
    fixed.copy_from(growing)
    took: dict[str, float] = {}
    try:
        for way in WAYS:
            replayed = way.endswith("replayed")
            if replayed and target.device.type != "cuda":
                continue
            target.backend = shorter if way.startswith("ours") else None
            cache = fixed if replayed else growing

            def read(cache: Any = cache) -> None:
                with torch.no_grad():
                    target.forward(tree, cache)

            pool = torch.cuda.graph_pool_handle() if replayed else None
            call = CapturedFunction(read, target.device, pool) if replayed else read
            took[way] = round(1e3 * _seconds(call, target), 4)
    finally:
        target.backend = shorter
    return took


def _tree(target: Target, count: int) -> Tree:
    import torch

    from headstart.model.tree.tree import Tree

    own_1N = torch.arange(count, device=target.device)[None]
    parents_1N = torch.where(own_1N > 0, (own_1N - 1) // CHILDREN, -1)
    return Tree(own_1N % target.vocab_size, parents_1N, -own_1N.float())


def _seconds(call: Callable[[], None], target: Target) -> float:
    """The median."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        call()
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter() - start

    for _ in range(3):
        once()
    took: list[float] = []
    while len(took) < 5 or sum(took) < SECONDS:
        took.append(once())
    return sorted(took)[len(took) // 2]


if __name__ == "__main__":
    typer.run(friendly(curve))
