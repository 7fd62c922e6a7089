"""A target whose layers two processes compute together sees what one process alone sees."""

from __future__ import annotations

import json
from typing import Any

import pytest
from families import FAMILIES, build
from resident_workers import run_together

PROCESSES = 2
# Plain, tied, norms of queries, windows and caps, experts, one matrix for q, k and v, latents;
# sparse attention, of which one layer takes over the choice of another.
SHARED = (
    *("llama", "llama_tied", "qwen3", "gemma2", "mixtral", "qwen3_moe", "phi3", "deepseek_v3"),
    "glm_moe_dsa",
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """By model folder: what both processes found."""
    folder = tmp_path_factory.mktemp("targets")
    models = {name: FAMILIES[name]() for name in SHARED}
    odd = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
    models["odd_heads"] = build("llama", odd)
    models["one_group"] = build("llama", {"num_key_value_heads": 1})
    models["no_plan"] = FAMILIES["gpt2"]()
    for name, model in models.items():
        model.save_pretrained(folder / name)
    gguf = folder / "plain.gguf"
    gguf.touch()
    folders = [folder / name for name in models]
    done = run_together(PROCESSES, "tensor_parallel_worker.py", folder, *folders, gguf)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((folder / f"facts_{n}.json").read_text()) for n in range(PROCESSES))
    assert first[0] == second[0] == PROCESSES and first[1].keys() == second[1].keys()
    for name, one in first[1].items():  # all processes agree, on errors too
        assert second[1][name].get("refused") == one.get("refused")
    return first[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_families_see_what_one_process_sees(facts, name):
    found = facts[name]
    assert "refused" not in found, found
    assert found["error"] < 1e-5
    assert found["same_hash"] and found["ends_whole"]
    assert found["share"] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("odd_heads", "3 attention heads and 3 of keys and values, which 2 processes"),
        ("one_group", "4 attention heads and 1 of keys and values, which 2 processes"),
        ("no_plan", "transformers has no tensor-parallel plan"),
        ("plain.gguf", "is a GGUF file, which cannot be sharded on load"),
    ],
)
def test_what_cannot_be_shared_is_refused(facts, name, what):
    assert what in str(facts[name]["refused"])
    assert "parallel.target=sharded" in str(facts[name]["refused"])
