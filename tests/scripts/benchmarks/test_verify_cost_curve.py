"""The verify cost curve, as a script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import DELTA, FAMILIES, build

from headstart.scripts.benchmarks.verify_cost_curve import verify_cost_curve


def test_every_mode_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["llama"]().config.save_pretrained(tmp_path)
    verify_cost_curve(str(tmp_path / "config.json"), context="32,200", nodes="1,6", dtype="float32")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["context"], one["nodes"]) for one in report["curve"]] == [
        (32, 1),
        (32, 6),
        (200, 1),
        (200, 6),
    ]
    modes = {"modules", "fused"}
    assert all(modes <= set(one["ms"]) and min(one["ms"].values()) > 0 for one in report["curve"])
    assert report["torch"] and report["device"] and report["bandwidth_gb_per_second"] > 0


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe a language model"):
        verify_cost_curve(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="--nodes takes whole numbers"):
        verify_cost_curve(str(tmp_path / "config.json"), nodes="many")


def test_recurrent_targets_are_refused(tmp_path: Path) -> None:
    build("qwen3_5_text", DELTA).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has recurrent layers, whose state cannot branch"):
        verify_cost_curve(str(tmp_path / "config.json"), nodes="1,6", dtype="float32")
