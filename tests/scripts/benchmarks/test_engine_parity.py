"""Heads in other engines: the report, with a stub as the engine, and vLLM itself if VLLM_PYTHON
names a Python that has it (half an hour)."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import mtp_checkpoints as published
import pytest
from export_cases import fused, random_head, write_plain
from mimo_form import as_mimo
from processes import HELPERS
from run_command import refused, run

from headstart.inference.config import SamplingParams
from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.target.load import load_target
from headstart.scripts.benchmarks import engine_server
from headstart.scripts.benchmarks.engine_parity import (
    Commands,
    Expected,
    _llama_server,
    _vllm_command,
    compare,
    decode_with_headstart,
    llama_cpp,
    report,
    vllm,
)
from headstart.scripts.benchmarks.engine_server import DraftCounters, running
from headstart.scripts.commands.generate_data import write_responses
from headstart.scripts.options.default_checkpoint import shipped_checkpoint
from headstart.scripts.options.prompts import read_prompts, shipped_prompts
from headstart.scripts.options.recipe import run_recipe
from headstart.training.config.schema import make_recipe

STUB = HELPERS / "stub_engine.py"
PROMPTS = [[5, 6], [7, 8, 9]]
RESPONSES = [[11, 12, 13, 2], [14, 15, 16, 17]]


@pytest.fixture
def responses(tmp_path: Path) -> Path:
    file = tmp_path / "responses.json"
    file.write_text(json.dumps(list(zip(PROMPTS, RESPONSES, strict=True))))
    return file


def stub(dialect: str, responses: Path, *more: str) -> list[str]:
    return [sys.executable, str(STUB), dialect, str(responses), *more]


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("dialect", ["vllm", "llama.cpp"])
def test_the_report(dialect, responses, tmp_path, capsys):
    ours = [[11, 12, 13], [14, 15, 16, 18]]  # without its end; different
    expected = Expected({"steps": 3}, PROMPTS, ours, [0.9, 0.7, 0.3], 2.8, frozenset({2}))
    commands = Commands(
        dialect, stub(dialect, responses), stub(dialect, responses, "--drafts"), {"A": "b"}
    )
    compare(commands, expected, 4, tmp_path, {"form": "fused"})
    report = reported(capsys)
    assert report["prompts"] == 2 and report["tokens"] == 8 and report["steps"] == 3
    assert report["identical_with_and_without_head"] == 2
    assert report["identical_to_headstart"] == 1
    rates = report["acceptance_rate_per_position"]
    # Three drafts per response; the warm-up does not count.
    assert rates["engine"] == [1, 0.6667, 0.3333] and rates["headstart"] == [0.9, 0.7, 0.3]
    assert rates["largest_difference"] == 0.1
    assert report["acceptance_length"] == {"headstart": 2.8, "engine": 3}
    assert report["engine_version"] == "stub" and report["speedup"] > 0


def test_different_responses_are_reported(responses, tmp_path, capsys):
    expected = Expected({}, PROMPTS, RESPONSES, [1, 0.6, 0.3], 2.9, frozenset({2}))
    plain, wrong = stub("vllm", responses), stub("vllm", responses, "--drafts", "--wrong")
    compare(Commands("vllm", plain, wrong, {}), expected, 4, tmp_path, {})
    report = reported(capsys)
    assert report["identical_with_and_without_head"] == report["identical_to_headstart"] == 0


def test_an_engine_that_does_not_draft(responses, tmp_path):
    expected = Expected({}, PROMPTS, RESPONSES, [1, 0.6, 0.3], 2.9, frozenset({2}))
    plain = stub("vllm", responses)
    with pytest.raises(ValueError, match="counted no drafts"):
        compare(Commands("vllm", plain, plain, {}), expected, 4, tmp_path, {})


def test_an_engine_that_does_not_start(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(ValueError, match=r"did not start.*\n.*no such model"):
        with running("vllm", "served", command, {}, tmp_path / "log"):
            pass


def test_an_engine_that_hangs_is_ended(responses, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_server, "RESPONSE_SECONDS", 0.5)
    monkeypatch.setattr(engine_server, "STOP_SECONDS", 0.5)
    began, command = time.monotonic(), stub("vllm", responses, "--slow", "--deaf")
    with (
        pytest.raises(ValueError, match=r"does not respond any more.*--logs"),
        running("vllm", "served", command, {}, tmp_path / "log") as server,
    ):
        server.generate(PROMPTS[0], 4)
    assert time.monotonic() - began < 30


def test_an_engine_that_ends_between_responses(responses, tmp_path):
    with running("vllm", "served", stub("vllm", responses), {}, tmp_path / "log") as server:
        server.generate(PROMPTS[0], 4)
    with pytest.raises(ValueError, match="does not respond any more"):
        server.generate(PROMPTS[0], 4)


def test_no_proxy_is_used_for_this_machine(responses, tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr("urllib.request._opener", None)  # one that knows the environment of before
    monkeypatch.setattr(engine_server, "START_SECONDS", 10)
    with running("vllm", "served", stub("vllm", responses), {}, tmp_path / "log") as server:
        assert server.generate(PROMPTS[0], 4)[0] == RESPONSES[0]


def test_missing_positions_count_as_zero():
    """Headstart reports fewer positions of short responses, llama.cpp of a poor head."""
    turn = (RESPONSES[0], 1.0), (RESPONSES[0], 1.0)
    for ours, theirs in (([0.5], (5, 3)), ([0.5, 0.3], (5,)), ([], ())):
        expected = Expected({}, PROMPTS[:1], RESPONSES[:1], ours, 1.5, frozenset())
        found = report(expected, [turn], DraftCounters(10, theirs))["acceptance_rate_per_position"]
        longest = max(len(ours), len(theirs))
        assert found["largest_difference"] == (0.3 if longest == 2 else 0.0)


def test_errors_come_before_any_work(tmp_path):
    for python in (tmp_path / "none", Path(sys.executable)):  # vLLM is not installed beside us
        with pytest.raises(ValueError, match="does not find vLLM"):
            vllm(tmp_path, python=python)
    with pytest.raises(ValueError, match="remove --steps"):
        vllm(tmp_path, form="speculators", steps=2)
    with pytest.raises(ValueError, match="build_llama_cpp"):
        llama_cpp(tmp_path, llama_cpp=tmp_path)
    plain = write_plain(tmp_path / "plain")
    head = random_head(load_target(plain, dtype="float32", device="cpu"), "medusa")
    with pytest.raises(ValueError, match="this one is medusa"):
        _vllm_command(fused(plain, head, tmp_path), "fused", None, tmp_path / "out")


def test_where_llama_cpp_puts_its_programs(tmp_path):
    place = tmp_path / "build" / "bin" / "Release"
    place.mkdir(parents=True)
    name = "llama-server.exe" if os.name == "nt" else "llama-server"
    (place / name).touch(mode=0o755)
    assert Path(_llama_server(tmp_path)) == place / name


def test_a_native_layer_drafts_as_many_tokens_on_both_sides(tmp_path, monkeypatch):
    published.write("glm4_moe", tmp_path / "plain")
    adopt(tmp_path / "plain", tmp_path / "head")
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "fused", native=True)
    monkeypatch.setattr("headstart.scripts.options.prompts.first_turns", lambda *_: PROMPTS)
    monkeypatch.setattr("headstart.scripts.options.prompts.decodable", lambda *_: [])
    for steps, count in ((None, 1), (2, 2)):
        line = _vllm_command(tmp_path / "fused", "fused", steps, tmp_path / "out")
        assert f'"num_speculative_tokens": {count}' in line
        expected = decode_with_headstart(tmp_path / "fused", "heldout", 2, 6, steps)
        assert expected.metadata["steps"] == count


def test_counters_since():
    assert DraftCounters(9, (5, 3)).since(DraftCounters(4, (2,))) == DraftCounters(5, (3, 3))


def test_headstart_with_a_chain(tmp_path, monkeypatch):
    """Rates are shares of all decode steps, each at most the one before."""
    plain = write_plain(tmp_path / "plain")
    target = load_target(plain, dtype="float32", device="cpu")
    head = random_head(target, draft_vocab=20)
    folder = fused(plain, head, tmp_path)
    monkeypatch.setattr("headstart.scripts.options.prompts.first_turns", lambda *_: PROMPTS)
    monkeypatch.setattr("headstart.scripts.options.prompts.decodable", lambda *_: [])
    expected = decode_with_headstart(folder, "heldout", 2, 6)
    assert expected.metadata["steps"] == 4 and expected.prompts == PROMPTS
    assert [len(one) for one in expected.responses] == [6, 6]
    assert len(decode_with_headstart(folder, "heldout", 2, 6, 2).rates) == 2
    assert len(expected.rates) == 4 and expected.rates == sorted(expected.rates, reverse=True)


def test_options_and_errors_of_llama_cpp(tmp_path):
    plain = write_plain(tmp_path / "plain")
    target = load_target(plain, dtype="float32", device="cpu")
    heads = {
        "plain": random_head(target, draft_vocab=20),
        "3.1": random_head(target, draft_vocab=20, fc_norm=True),
        "two": random_head(target, draft_vocab=20, taps=(1, 4)),
    }
    folders = {name: fused(plain, head, tmp_path / name) for name, head in heads.items()}
    source = tmp_path / "llama.cpp"
    given = ("export", folders["plain"], tmp_path / "out", "--to", "llama.cpp")
    assert "--llama-cpp FOLDER" in refused(*given)
    assert "no convert_hf_to_gguf.py" in refused(*given, "--llama-cpp", tmp_path)
    source.mkdir()
    (source / "convert_hf_to_gguf.py").write_text("raise SystemExit('unknown tensor')")
    given = (*given, "--llama-cpp", source)
    assert "unknown tensor" in refused(*given)
    said = "import sys; sys.stderr.buffer.write(b'no \\xff such key'); raise SystemExit(1)"
    (source / "convert_hf_to_gguf.py").write_text(said)
    assert "such key" in refused(*given) and not (tmp_path / "out").exists()
    assert "is not a .gguf file" in refused(*given, "--verifier", folders["plain"])
    for name, reason in (("3.1", "norms of EAGLE-3.1"), ("two", "taps three layers")):
        assert reason in refused("export", folders[name], *given[2:])
    assert "belong to --to llama.cpp" in refused(*given[:4], "vllm", "--outtype", "f32")


def test_the_options_of_llama_cpps_converter(tmp_path):
    plain = write_plain(tmp_path / "plain")
    target = load_target(plain, dtype="float32", device="cpu")
    folder = fused(plain, random_head(target, draft_vocab=20), tmp_path)
    source, out = tmp_path / "llama.cpp", tmp_path / "out"
    source.mkdir()
    (source / "convert_hf_to_gguf.py").write_text(
        "import sys; from pathlib import Path; given = sys.argv[1:]\n"
        "Path(given[given.index('--outfile') + 1]).write_text(' '.join(given))"
    )
    given = ("export", folder, out, "--to", "llama.cpp", "--llama-cpp", source, "--outtype", "f16")
    printed = run(*given).output
    draft = f"-md {out}/head.gguf --spec-type draft-eagle3 --spec-draft-n-max 4"
    assert f"llama-server -m {out}/target.gguf {draft}" in printed
    head = (out / "head.gguf").read_text()
    assert head.startswith(f"{folder}/draft_heads ") and f"--target-model-dir {folder}" in head
    assert "--outtype f16" in head and (out / "target.gguf").read_text().startswith(f"{folder} ")
    (tmp_path / "mine.gguf").write_text("")
    printed = run(*given, "--verifier", tmp_path / "mine.gguf").output
    assert f"-m {tmp_path}/mine.gguf -md {out}/head.gguf" in printed
    assert not (out / "target.gguf").exists()


needs_vllm = pytest.mark.skipif(
    "VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no Python with vLLM"
)


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("form", ["fused", "native", "speculators"])
def test_the_shipped_head_in_vllm(form, capsys):
    vllm(python=Path(os.environ["VLLM_PYTHON"]), form=form)
    report = reported(capsys)
    assert report["identical_with_and_without_head"] == report["prompts"] == 40
    assert report["acceptance_rate_per_position"]["largest_difference"] <= 0.03


@pytest.mark.slow
@needs_vllm
def test_a_layer_of_the_targets_own_in_vllm(tmp_path, capsys):
    """Hardly trained, so few draft tokens are accepted; with another layout none would be."""
    root = as_mimo(shipped_checkpoint(), tmp_path / "target")
    adopt(root, tmp_path / "adopted")
    target = load_target(root)
    texts, _ = read_prompts([str(shipped_prompts("train"))])
    file = tmp_path / "responses.jsonl"
    write_responses(target, texts[:96], SamplingParams(max_new_tokens=64), file, batch_size=48)
    values = {
        "target": {"name": str(root)},
        "head": {"kind": "mtp"},
        "data": {"path": str(file), "max_length": 256, "global_batch_tokens": 1024},
        "loss": {"kind": "lk", "steps": 2, "chunk_rows": 256},
        "train": {
            "output": str(tmp_path / "run"), "start_from": str(tmp_path / "adopted"), "steps": 80,
            "optimizer": "muon", "lr": 5e-3,
        },
        "eval": {"prompts": None},
    }  # fmt: skip
    best = run_recipe(make_recipe(values), target)
    fuse(root, best, tmp_path / "fused", native=True)
    options = "--dtype float32 --enforce-eager --no-enable-prefix-caching --trust-remote-code"
    vllm(tmp_path / "fused", python=Path(os.environ["VLLM_PYTHON"]), options=options)
    report = reported(capsys)
    assert report["identical_with_and_without_head"] == report["prompts"] == 40
    rates = report["acceptance_rate_per_position"]
    assert rates["headstart"][0] > 0.08 and rates["largest_difference"] <= 0.03
