"""What stops a run costs no training, and what the message advises works."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.model.heads.common.base import DraftHead
from headstart.model.target.target import Target
from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.reporting.metrics_log import Progress
from headstart.training.run.signals import SAME_SECONDS, Interrupted
from headstart.training.run.train_state import TrainState
from headstart.training.trainer import train


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def recipe_for(tmp_path: Path, **sections) -> Recipe:
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    plain = tiny_recipe(tmp_path / "run", data, log_every=1, **{"steps": 6} | sections["train"])
    values = plain.model_dump(exclude_none=True)
    for name in ("data", "loss", "eval"):
        values[name] |= sections.get(name, {})
    return make_recipe(values)


def metadata(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "run" / "state" / "state.json").read_text())


def trained_steps(seen: list[Progress]) -> list[int]:
    return [at.step for at in seen if at.kind == "train"]


@pytest.mark.parametrize("every", [4, 0])
def test_a_failing_evaluation_loses_no_training(target, tmp_path, every):
    def broken(head: DraftHead) -> dict[str, float]:
        raise RuntimeError("the graph is broken")

    first = every or 6
    with pytest.raises(RuntimeError, match="the graph is broken"):
        train(
            recipe_for(tmp_path, train={}, eval={"every": every}),
            target=target,
            head=tiny_head(target),
            evaluate=broken,
        )
    assert metadata(tmp_path)["step"] == first and (tmp_path / "run" / "last").is_dir()
    seen: list[Progress] = []
    result = train(
        recipe_for(tmp_path, train={"resume": True}, eval={"every": every}),
        target=target,
        head=tiny_head(target),
        evaluate=lambda head: {"acceptance_length": 2.0},
        log=seen.append,
    )
    assert trained_steps(seen) == list(range(first + 1, 7))
    assert [at.step for at in seen if at.kind == "eval"] == sorted({first, 6})
    assert (result.best_step, result.score) == (first, 2.0)


def fail_in(head: DraftHead, call: int, how) -> DraftHead:
    calls, unroll = iter(range(1, 1000)), head.unroll
    head.unroll = lambda *given: how(unroll(*given)) if next(calls) == call else unroll(*given)
    return head


def test_after_a_loss_that_is_no_number_the_advice_works(target, tmp_path):
    head = fail_in(tiny_head(target), 4, lambda rows: [row * math.nan for row in rows])
    with pytest.raises(FloatingPointError) as caught:
        train(recipe_for(tmp_path, train={"precision": "bfloat16"}), target=target, head=head)
    assert "Step 3 of 6 is saved" in str(caught.value)
    assert "train.resume=true" in str(caught.value)
    assert "train.precision=float32" in str(caught.value)
    seen: list[Progress] = []
    settings = {"resume": True, "precision": "float32", "lr": 1e-3, "clip": 0.5}
    recipe = recipe_for(tmp_path, train=settings, loss={"chunk_rows": 20})
    train(recipe, target=target, head=tiny_head(target), log=seen.append)
    assert trained_steps(seen) == [4, 5, 6]
    assert metadata(tmp_path)["recipe"]["train"]["precision"] == "float32"


def test_out_of_memory_says_what_is_saved(target, tmp_path):
    def too_large(rows: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.empty(1 << 60)]

    head = fail_in(tiny_head(target), 1, too_large)
    with pytest.raises(MemoryError, match="Nothing of this run is saved yet"):
        train(recipe_for(tmp_path, train={}), target=target, head=head)
    head = fail_in(tiny_head(target), 4, too_large)  # the same folder: nothing was learned in it
    with pytest.raises(
        MemoryError,
        match=r"Step 2 of 6 is saved.*may set loss\.recompute=true, and lower loss\.chunk_rows",
    ):
        train(recipe_for(tmp_path, train={"save_every": 2}), target=target, head=head)
    recipe = recipe_for(tmp_path, train={"save_every": 2, "resume": True}, loss={"chunk_rows": 20})
    assert train(recipe, target=target, head=tiny_head(target)).steps == 6


@pytest.mark.parametrize("name", ["best", "last", "metrics.jsonl", "state"])
def test_what_another_run_left_is_not_replaced(target, tmp_path, name):
    kept = tmp_path / "run" / name
    kept = kept if name == "metrics.jsonl" else kept / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("precious")
    with pytest.raises(ValueError, match=rf"holds {name}.*no run to resume.*train\.output"):
        train(recipe_for(tmp_path, train={}), target=target, head=tiny_head(target))
    assert kept.read_text() == "precious"


def test_an_output_below_a_file_is_refused(target, tmp_path):
    (tmp_path / "run").write_text("")
    recipe = recipe_for(tmp_path, train={})
    deeper = recipe.train.model_copy(update={"output": str(tmp_path / "run" / "deeper")})
    for one in (recipe, recipe.model_copy(update={"train": deeper})):
        with pytest.raises(ValueError, match=r"run is a file\. Choose another train\.output"):
            train(one, target=target, head=tiny_head(target))


def test_stopping_abandons_an_evaluation(target, tmp_path, capfd):
    def decoding(head: DraftHead) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the evaluation went on")

    recipe = recipe_for(tmp_path, train={}, eval={"every": 2})
    with pytest.raises(Interrupted, match=r"after step 2 of 6; saved in .*train\.resume=true"):
        train(recipe, target=target, head=tiny_head(target), evaluate=decoding)
    assert "Stopping after this step; Ctrl-C again to stop at once." in capfd.readouterr().err
    seen: list[Progress] = []
    train(
        recipe_for(tmp_path, train={"resume": True}, eval={"every": 2}),
        target=target,
        head=tiny_head(target),
        evaluate=lambda head: {"acceptance_length": 1.5},
        log=seen.append,
    )
    assert [at.step for at in seen if at.kind == "eval"] == [2, 4, 6]


def test_stopping_twice_says_what_is_saved(target, tmp_path):
    def twice(at: Progress) -> None:
        if at.kind == "train" and at.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(SAME_SECONDS * 1.2)
            os.kill(os.getpid(), signal.SIGINT)

    recipe = recipe_for(tmp_path, train={"save_every": 2})
    with pytest.raises(KeyboardInterrupt, match=r"Step 2 of 6 is saved .*train\.resume=true"):
        train(recipe, target=target, head=tiny_head(target), log=twice)


def stopped(tmp_path: Path, target: Target, step: int, **sections) -> None:
    def stop(at: Progress) -> None:
        if at.kind == "train" and at.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(recipe_for(tmp_path, **sections), target=target, head=tiny_head(target), log=stop)


def test_another_target_is_refused(target, tmp_path):
    stopped(tmp_path, target, 2, train={})
    other = tiny_target()
    with torch.no_grad():
        other.model.get_output_embeddings().weight[0] += 1
    with pytest.raises(ValueError, match=r"The target has changed.*another train\.output"):
        train(recipe_for(tmp_path, train={"resume": True}), target=other, head=tiny_head(other))


def test_a_score_of_other_evaluations_is_forgotten(target, tmp_path):
    sections = {"data": {"holdout": 4}, "eval": {"every": 2}}
    stopped(tmp_path, target, 3, train={}, **sections)
    path = tmp_path / "run" / "state" / "state.json"
    path.write_text(json.dumps(metadata(tmp_path) | {"score": 99.0}))
    seen: list[Progress] = []
    again = sections | {"eval": {"every": 2, "count": 5}}
    result = train(
        recipe_for(tmp_path, train={"resume": True}, **again),
        target=target,
        head=tiny_head(target),
        log=seen.append,
    )
    assert result.score is not None and result.score < 99 and result.best_step >= 4
    assert any("Evaluation has changed" in at.message for at in seen)


def test_a_score_that_is_no_number_never_stays_best():
    at = TrainState(score=math.nan)
    assert at.is_best(0.5) and not TrainState(score=0.5).is_best(math.nan)


def test_precision_fits_the_machine_and_stays(target, tmp_path, monkeypatch):
    monkeypatch.setattr("headstart.training.optim.precision.native_bfloat16", lambda: False)
    stopped(tmp_path, target, 2, train={"precision": "auto"})
    assert metadata(tmp_path)["recipe"]["train"]["precision"] == "float32"
    monkeypatch.setattr("headstart.training.optim.precision.native_bfloat16", lambda: True)
    recipe = recipe_for(tmp_path, train={"precision": "auto", "resume": True})
    train(recipe, target=target, head=tiny_head(target))
    assert metadata(tmp_path)["recipe"]["train"]["precision"] == "float32"
    new = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={"resume": False, "output": str(tmp_path / "new")}
            )
        }
    )
    train(new, target=target, head=tiny_head(target))
    saved = json.loads((tmp_path / "new" / "state" / "state.json").read_text())
    assert saved["recipe"]["train"]["precision"] == "bfloat16"


def test_a_run_of_former_settings_resumes(target, tmp_path):
    """One from before a setting existed or was renamed, or with settings that were removed."""
    recipe = recipe_for(tmp_path, train={"steps": 2})
    train(recipe, target=target, head=tiny_head(target))
    path = tmp_path / "run" / "state" / "state.json"
    saved = json.loads(path.read_text())
    del saved["recipe"]["joint"], saved["recipe"]["train"]["keep"]
    saved["answer_tokens"] = saved.pop("labels")  # its former name
    data = saved["recipe"]["data"]
    data["pack"] = saved["recipe"]["train"]["compile"] = False
    data["batch_tokens"] = data.pop("global_batch_tokens")  # its former name
    path.write_text(json.dumps(saved))
    again = recipe_for(tmp_path, train={"steps": 2, "resume": True})
    train(again, target=target, head=tiny_head(target))
    for section, name in (("data", "pack"), ("train", "compile")):
        changed = copy.deepcopy(saved)
        changed["recipe"][section][name] = True
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"with {section}.{name}=True, a setting.*removed"):
            train(again, target=target, head=tiny_head(target))
