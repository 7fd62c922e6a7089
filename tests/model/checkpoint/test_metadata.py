"""Metadata of heads: old folders still load, unknown keys are an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_heads import random_head

from headstart.model.checkpoint.fused import rewrite_meta
from headstart.model.checkpoint.head import load_head, read_head_file
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import head_class
from headstart.model.target.target import Target
from headstart.scripts.options.default_checkpoint import shipped_head

# What version 0.1.0 wrote before its keys got the field's words.
OLD: dict[str, Any] = {
    "target": "someone/tiny",
    "grafts": [{"source": "someone/base", "before": 2.5, "after": 2.25}],
    "steps": 3,
    "joint": {"rank": 4, "alpha": 8.0, "keep": 0.5, "divergence": 0.01},
    "temperatures": [0.9, 0.95],
    "rank_acceptance": [[0.6, 0.1], [0.5, 0.1]],
    "calibration_rows": [200, 150],
    "calibration_errors": [[0.1, 0.02], [0.2, 0.03]],
    "measured": [
        {
            "prompts": "talk",
            "tokens": 9,
            "accepted_length": 2.25,
            "acceptance": [0.5, 0.25],
            "speedup": 1.5,
            "answers": 8,
            "identical": 7,
            "conditions": "here",
        }
    ],
}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["headstart"]["meta"] = meta
    path.write_text(json.dumps(config))


def test_a_head_saved_with_old_keys_loads(target: Target, saved: Path) -> None:
    write_meta(saved, OLD)
    head = load_head(saved, target)
    assert head.temperatures == (0.9, 0.95) and head.rank_acceptance == ((0.6, 0.1), (0.5, 0.1))
    meta = read_head_file(saved).meta
    (measured,) = meta.measured
    assert measured.acceptance_length == 2.25 and measured.acceptance_rates == (0.5, 0.25)
    assert (measured.responses, measured.identical) == (8, 7)
    assert meta.calibration_positions == (200, 150)
    assert meta.joint is not None and meta.joint.divergence_weight == 0.5
    # What is written from now on has today's keys only.
    rewrite_meta(saved, random_head(target, "eagle3"), meta)
    written = json.loads((saved / "config.json").read_text())["headstart"]["meta"]
    assert read_head_file(saved).meta == meta
    assert not written.keys() & {"calibration_rows"}
    assert not written["measured"][0].keys() & {"accepted_length", "acceptance", "answers"}
    assert not written["joint"].keys() & {"keep"}


@pytest.mark.parametrize(
    "change",
    [
        {"colour": "blue"},
        {"measured": [OLD["measured"][0] | {"colour": "blue"}]},
        {"measured": [OLD["measured"][0] | {"acceptance_length": 2.0, "accepted_length": 2.0}]},
    ],
)
def test_unknown_and_doubled_keys_are_an_error(saved: Path, change: dict[str, Any]) -> None:
    write_meta(saved, OLD | change)
    with pytest.raises(ValueError, match="holds no draft head"):
        read_head_file(saved)


def test_the_shipped_head_has_todays_keys() -> None:
    file = read_head_file(shipped_head())
    written = json.loads((shipped_head() / "config.json").read_text())["headstart"]
    assert written == file.model_dump(mode="json")
    head_type, config_type = head_class("eagle3")
    with torch.device("meta"):
        assert head_type(config_type.model_validate(file.head)).taps == (1, 14, 26)


def test_a_grafted_head_keeps_what_describes_its_training() -> None:
    meta = HeadMeta.model_validate(OLD)
    grafted = meta.grafted("someone/new", 2.25, 2.0, meta.measured[0])
    assert grafted.target == "someone/new" and grafted.trained_on == "someone/base"
    assert [one.source for one in grafted.grafts] == ["someone/base", "someone/tiny"]
    assert grafted.steps == 3 and grafted.joint == meta.joint
    assert not grafted.temperatures and not grafted.calibration_positions
