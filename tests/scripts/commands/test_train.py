"""What `headstart train` puts together: the first weights, and the evaluation that decodes."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from chat_model import save
from safetensors.torch import load_file
from tiny_run import mixed_rows, tiny_target, write_rows

from headstart.model.checkpoint.head import read_head_file
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.scripts.options.recipe import evaluator, run_recipe
from headstart.training.config.schema import EvalConfig, load_recipe, make_recipe

RECIPES = sorted(Path(str(resources.files("headstart.configs"))).glob("*.yaml"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save(tmp_path_factory.mktemp("target"), context=2048))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_decodes_to_choose_the_best_head(path, chatty):
    assert evaluator(load_recipe(path).eval, chatty) is not None


def test_without_a_chat_template_the_held_out_loss_decides(capsys):
    assert evaluator(EvalConfig(), tiny_target()) is None
    assert "no chat template" in capsys.readouterr().out


def test_prompts_can_be_switched_off(chatty):
    assert evaluator(EvalConfig(prompts=None), chatty) is None


def test_a_prompt_that_is_too_long_is_named_first(tmp_path):
    short = load_target(save(tmp_path / "target", context=128))
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"id": name, "prompt": name * 40}) for name in ("a", "bcdef")]
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"prompt .bcdef. has .*is 128"):
        evaluator(EvalConfig(prompts=str(path)), short)
    assert evaluator(EvalConfig(prompts=str(path), count=1), short) is not None


def test_the_seed_decides_the_first_weights(tmp_path):
    target = tiny_target()
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(8))
    found = []
    for run, seed in enumerate((1, 1, 2)):
        torch.manual_seed(100 + run)  # whatever was drawn before
        values = {
            "target": {"random": {"model_type": "llama"}},
            "head": {"kind": "eagle3"},
            "data": {"path": str(data), "max_length": 32, "global_batch_tokens": 1024},
            "loss": {"steps": 2},
            "train": {"output": str(tmp_path / str(run)), "steps": 1, "lr": 1e-12, "seed": seed},
        }
        run_recipe(make_recipe(values), target)
        found.append(load_file(tmp_path / str(run) / "state" / "state.safetensors"))
    weights = [name for name in found[0] if name.startswith("head.")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in weights)
    assert not all(torch.allclose(found[0][name], found[2][name]) for name in weights)


def recipe_values(tmp_path: Path, **train) -> dict:
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(8))
    return {
        "target": {"random": {"model_type": "llama"}},
        "head": {"kind": "mtp"},
        "data": {"path": str(data), "max_length": 32, "global_batch_tokens": 1024},
        "loss": {"steps": 2},
        "train": {"output": str(tmp_path / "run"), "steps": 1, **train},
    }


def test_one_size_of_a_layer_changes_only_that(tmp_path):
    values = recipe_values(tmp_path)
    values["head"]["layer"] = {"intermediate_size": 24}
    run_recipe(make_recipe(values), tiny_target())
    saved = load_file(tmp_path / "run" / "state" / "state.safetensors")
    assert saved["head.layer.mlp.up_proj.weight"].shape == (24, 48)


@pytest.mark.parametrize("rope", ["default", "longrope"])
def test_conversations_beyond_the_target_are_refused(tmp_path, rope):
    target = tiny_target()
    if rope == "default":
        target.config.max_position_embeddings = 16
    else:  # the length it was first trained for, as in decoding
        target.config.rope_parameters = {
            "rope_type": "longrope",
            "original_max_position_embeddings": 16,
        }
    with pytest.raises(ValueError, match=r"is 16\. Set data\.max_length=16"):
        run_recipe(make_recipe(recipe_values(tmp_path)), target)


@pytest.mark.parametrize("broken", ["output", "wandb"])
def test_what_needs_no_target_is_checked_before_it_is_loaded(tmp_path, monkeypatch, broken):
    def loaded(recipe):
        raise AssertionError("the target was loaded")

    monkeypatch.setattr("headstart.scripts.options.recipe.open_target", loaded)
    if broken == "output":
        (tmp_path / "run").write_text("")
        with pytest.raises(ValueError, match="is a file"):
            run_recipe(make_recipe(recipe_values(tmp_path)))
        return
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ValueError, match=r"wandb login.*train\.wandb\.mode=offline"):
        run_recipe(make_recipe(recipe_values(tmp_path, wandb={"project": "x"})))


def test_a_trained_head_can_be_trained_on(tmp_path):
    """With its own settings and draft vocabulary, on another target of the same sizes too."""
    values = recipe_values(tmp_path, output=str(tmp_path / "first"))
    values["head"] = {"kind": "eagle3", "fc_norm": True, "draft_vocab": 20}
    first = run_recipe(make_recipe(values), tiny_target())
    other = tiny_target()
    with torch.no_grad():
        other.model.get_output_embeddings().weight.mul_(1.5)
    more = {"start_from": str(first), "lr": 1e-12, "output": str(tmp_path / "second")}
    values = recipe_values(tmp_path, **more)
    values["head"] = {"kind": "eagle3", "window": 16}
    second = run_recipe(make_recipe(values), other)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    head = read_head_file(second).head
    assert head["fc_norm"] and head["window"] == 16
    assert read_head_file(second).meta.start == str(first)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kind": "mtp"}, r"is a head of kind eagle3, .*Name another folder"),
        ({"kind": "eagle3", "taps": [0]}, r"holds fc.weight as .* asks for"),
    ],
)
def test_a_head_that_does_not_fit_is_no_start(head, message, tmp_path):
    values = recipe_values(tmp_path, output=str(tmp_path / "first"))
    first = run_recipe(make_recipe(values | {"head": {"kind": "eagle3"}}), tiny_target())
    values = recipe_values(tmp_path, start_from=str(first), output=str(tmp_path / "second"))
    with pytest.raises(ValueError, match=message):
        run_recipe(make_recipe(values | {"head": head}), tiny_target())
    assert not (tmp_path / "second").exists()


def test_a_start_that_is_not_there_is_said_before_the_target_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("headstart.scripts.options.recipe.open_target", None)
    with pytest.raises(ValueError, match="holds no draft head"):
        run_recipe(make_recipe(recipe_values(tmp_path, start_from=str(tmp_path / "none"))))
