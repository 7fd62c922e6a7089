"""Command lines that start an inference engine which drafts with a head."""

from __future__ import annotations

import json
import shlex

from .engine_support import Engine

DEFAULT_DRAFT_STEPS = 3  # draft tokens per verify pass if it is not known how many were trained


def launch_line(engine: Engine, target: str, draft: str, steps: int | None) -> str:
    """Return the shell command of an engine that drafts chains with a head.

    target, draft: folders of the target and of the head; for llama.cpp their GGUF files.
    steps: number of draft steps that the head was trained for (default: 3).
    """
    steps = steps or DEFAULT_DRAFT_STEPS
    if engine == "llama.cpp":
        drafting = ["--spec-type", "draft-eagle3", "--spec-draft-n-max", str(steps)]
        return shlex.join(["llama-server", "-m", target, "-md", draft, *drafting])
    if engine == "vllm":
        return _vllm_line(target, method="eagle3", model=draft, num_speculative_tokens=steps)
    options = {
        "model-path": target,
        "speculative-algorithm": "EAGLE3",
        "speculative-draft-model-path": draft,
        "speculative-num-steps": steps,
        "speculative-eagle-topk": 1,
        "speculative-num-draft-tokens": steps + 1,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return shlex.join(["python", "-m", "sglang.launch_server", *given])


def mtp_launch_line(folder: str, steps: int | None) -> str:
    """Return the shell command of vLLM that drafts with the target's own MTP layer."""
    return _vllm_line(folder, method="mtp", num_speculative_tokens=steps or 1)


def _vllm_line(target: str, **config: str | int) -> str:
    return shlex.join(["vllm", "serve", target, "--speculative-config", json.dumps(config)])
