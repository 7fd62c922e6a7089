"""The curve of reads, as a script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import DELTA, FAMILIES, build

from headstart.scripts.benchmarks.verify_cost_curve import curve


def test_reads_are_timed_on_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["llama"]().config.save_pretrained(tmp_path)
    curve(str(tmp_path / "config.json"), context="32,200", nodes="1,6", dtype="float32")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["context"], one["nodes"]) for one in told["curve"]] == [
        (32, 1),
        (32, 6),
        (200, 1),
        (200, 6),
    ]
    ways = {"modules", "ours"}
    assert all(ways <= set(one["ms"]) and min(one["ms"].values()) > 0 for one in told["curve"])
    assert told["torch"] and told["device"] and told["bandwidth_gb_per_second"] > 0


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not say the shape"):
        curve(str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="--nodes takes whole numbers"):
        curve(str(tmp_path / "config.json"), nodes="many")


def test_recurrent_layers_read_no_trees(tmp_path: Path) -> None:
    build("qwen3_5_text", DELTA).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has recurrent layers, whose state cannot branch"):
        curve(str(tmp_path / "config.json"), nodes="1,6", dtype="float32")
