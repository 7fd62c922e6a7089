"""Which engine can draft with which head."""

from __future__ import annotations

from typing import get_args

import pytest
from saved_heads import random_head

from headstart.model.checkpoint.engine_support import Drafter, support
from headstart.model.target.target import Target

Settings = dict[str, object]
EVERYWHERE: set[str] = {"vllm", "sglang", "llama.cpp", "transformers"}
CASES: list[tuple[str, Settings, set[str]]] = [
    ("eagle3", {}, EVERYWHERE),
    ("eagle3", {"taps": (1, 2)}, EVERYWHERE - {"llama.cpp"}),
    ("eagle3", {"fc_norm": True}, EVERYWHERE - {"llama.cpp"}),
    ("eagle3", {"norm_output": True}, EVERYWHERE - {"llama.cpp"}),
    ("eagle3", {"taps": (2,)}, {"transformers"}),
    ("eagle3", {"window": 4}, {"transformers"}),
    ("eagle3", {"attention_layout": "kvshare"}, {"transformers"}),
    ("mtp", {}, {"native_mtp", "transformers"}),
    ("mtp", {"attention_layout": "kvshare"}, {"native_mtp", "transformers"}),
    ("mtp", {"window": 4}, {"transformers"}),
    ("mtp", {"zero_centred": True}, {"native_mtp"}),
    ("medusa", {}, {"transformers"}),
]


@pytest.mark.parametrize(("kind", "settings", "engines"), CASES)
def test_engines_of_a_head(
    target: Target, kind: str, settings: Settings, engines: set[str]
) -> None:
    head = random_head(target, kind, **settings)
    reasons = {engine: support(head, engine) for engine in get_args(Drafter)}
    assert {engine for engine, reason in reasons.items() if reason is None} == engines
    assert all(reason is None or len(reason) > 20 for reason in reasons.values())


@pytest.mark.parametrize("option", ["qk_norm", "attention_bias"])
def test_layers_that_engines_lack(target: Target, option: str) -> None:
    layer = random_head(target, "eagle3").config.layer.model_copy(update={option: True})
    head = random_head(target, "eagle3", layer=layer.model_dump())
    assert "queries" in str(support(head, "vllm")) and support(head, "transformers") is None
