"""Recipes: every shipped one loads and fits its target; mistakes are named."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel
from transformers import AutoConfig, AutoModelForCausalLM

from headstart.model.heads.common.base import head_class
from headstart.model.heads.common.borrow import layer_sizes
from headstart.model.target.modules import decoder_layers
from headstart.training.config.errors import sections_of
from headstart.training.config.explain import explain
from headstart.training.config.schema import Recipe, load_recipe, make_recipe

RECIPES = sorted(Path(str(resources.files("headstart.configs"))).glob("*.yaml"))
SMALL = next(path for path in RECIPES if path.stem == "smollm2-135m_mtp")

# From the published config.json of each model.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-8b_eagle3": {
        "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "llama-3.1-8b_eagle3": {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "glm-4.5-air_mtp": {
        "model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944,
        "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8,
        "head_dim": 128, "vocab_size": 151552, "rms_norm_eps": 1e-5, "attention_bias": True,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5,
        },
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
}  # fmt: skip


class Shapes:
    """What a head asks of its target, on weights that do not exist."""

    def __init__(self, settings: dict[str, Any]):
        sizes = dict(settings)
        self.config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(self.config)
        self.name = "published"
        self.hidden_size, self.vocab_size = self.config.hidden_size, self.config.vocab_size
        self.layers = decoder_layers(self.model.get_decoder(), self.config, self.name)
        self.num_layers = len(self.layers)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_explains_itself(path):
    recipe = load_recipe(path)
    text = explain(recipe)
    assert recipe.head.kind in text and "batch_tokens" in text
    _, config_type = head_class(recipe.head.kind)
    assert set(recipe.head.settings) <= set(config_type.model_fields)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipes_that_need_a_cluster_have_the_right_shapes(name):
    published = PUBLISHED[name]
    recipe = load_recipe(next(path for path in RECIPES if path.stem == name))
    target: Any = Shapes(published)
    head_type, config_type = head_class(recipe.head.kind)
    sizes = {"hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    settings = head_type.defaults(target) | sizes | recipe.head.settings
    with torch.device("meta"):
        head = head_type(config_type.model_validate({"kind": recipe.head.kind} | settings))
    layer = layer_sizes(target)
    hidden, heads = published["hidden_size"], published["num_attention_heads"]
    head_dim = published.get("head_dim", hidden // heads)
    assert layer["intermediate_size"] == published["intermediate_size"]
    assert layer["num_key_value_heads"] == published["num_key_value_heads"]
    assert layer["rope_theta"] == published["rope_parameters"]["rope_theta"]
    shapes = {key: list(value.shape) for key, value in head.state_dict().items()}
    assert shapes["d2t"] == [32000]
    if recipe.head.kind == "eagle3":
        layers = published["num_hidden_layers"]
        assert head.taps == (1, layers // 2 - 1, layers - 4)  # what the engines' defaults read
        assert shapes["fc.weight"] == [hidden, 3 * hidden]
        assert shapes["midlayer.self_attn.q_proj.weight"] == [heads * head_dim, 2 * hidden]
    else:
        assert shapes["eh_proj.weight"] == [hidden, 2 * hidden]
        assert shapes["layer.self_attn.q_proj.weight"] == [heads * head_dim, hidden]
    assert all(value.device.type == "meta" for value in head.parameters())


def test_overrides_are_typed():
    recipe = load_recipe(SMALL, ["train.lr=1e-5", "head.draft_vocab=null", "data.path=x.jsonl"])
    assert recipe.train.lr == 1e-5
    assert recipe.head.settings["draft_vocab"] is None
    assert recipe.data.path == "x.jsonl"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.lrr=1", "train.lr"),
        ("trian.lr=1", "train"),
        ("head.draft_vocabulary=1", "draft_vocab"),
        ("loss.step=1", "loss.steps"),
        ("eval.node=1", "eval.nodes"),
        ("head.layer.head_dimm=8", r"head\.layer\.head_dim\?"),
        (
            "target={random: {model_type: llama, hidden_sise: 8}}",
            r"target\.random\.hidden_size\?",
        ),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(override, named):
    with pytest.raises(ValueError, match=named):
        load_recipe(SMALL, [override])


@pytest.mark.parametrize("setting", ["data.pack", "train.compile"])
@pytest.mark.parametrize("value", ["true", "false"])
def test_removed_settings_are_refused_with_the_reason(setting, value):
    with pytest.raises(ValueError, match=rf"{setting} \(removed: .*(slower|faster).*leave it out"):
        load_recipe(SMALL, [f"{setting}={value}"])


def test_renamed_settings_are_refused_with_their_name():
    renamed = r"data\.batch_tokens \(renamed: write data\.global_batch_tokens\)"
    with pytest.raises(ValueError, match=renamed):
        load_recipe(SMALL, ["data.batch_tokens=64"])


@pytest.mark.parametrize(
    "override",
    [
        *("train.lr=fast", "train.lr=-1", "loss.kind=ce", "train.lr", "target.dtype=float64"),
        *("head.draft_vocab=0", "head.draft_vocab=-5", "head.draft_vocab=many"),
        *("head.layer.head_dim=wide", "head.attention_layout=none", "head.layer=3"),
        *("head.kind=medusae", "head.window=0", "data.path=3", "train.resume=maybe"),
        *("train.betas=[0.9,much]", "joint.modules=all"),
    ],
)
def test_wrong_values_name_the_key(override):
    with pytest.raises(ValueError, match=override.split("=")[0].replace(".", r"\.")):
        load_recipe(SMALL, [override])


def test_a_kind_of_head_is_found_by_its_nearest_name():
    with pytest.raises(ValueError, match=r"head\.kind: unknown medusae \(did you mean medusa\?\)"):
        load_recipe(SMALL, ["head.kind=medusae"])
    with pytest.raises(ValueError, match=r"head\.kind: Field required: one of .*medusa"):
        load_recipe(SMALL, ["head={draft_vocab: 8}"])


def test_a_value_of_several_types_is_told_once():
    with pytest.raises(ValueError) as refused:
        load_recipe(SMALL, ["data.path=3", "head.layer=wide", "eval.contexts=[0]"])
    lines = [line.split(":")[0].strip() for line in str(refused.value).splitlines()[1:]]
    assert lines == ["head.layer", "data.path", "eval.contexts.0"]


def described(model: type[BaseModel], path: str = "") -> dict[str, str | None]:
    """Every setting by its full name, with its meaning."""
    found: dict[str, str | None] = {}
    for name, field in model.model_fields.items():
        found[path + name] = field.description
        for section in sections_of(field.annotation):
            found |= described(section, f"{path}{name}.")
    return found


def test_every_setting_says_what_it_means():
    settings = described(Recipe)
    assert {"head.taps", "head.layer.rope_theta", "head.num_heads"} <= settings.keys()
    assert {"train.wandb.mode", "joint.rank", "eval.contexts"} <= settings.keys()
    assert [name for name, text in settings.items() if not text] == []
    text = " ".join(explain(load_recipe(SMALL)).replace("#", " ").split())
    for name, meaning in described(type(load_recipe(SMALL).head)).items():
        assert f"{name.split('.')[-1]}:" in text and meaning is not None
        assert " ".join(meaning.split()) in text


def test_the_explanation_says_what_the_first_head_decides():
    text = explain(load_recipe(SMALL, ["train.start_from=run/best", "head.layer={head_dim: 8}"]))
    assert "  # window:  # from train.start_from" in text
    again = make_recipe(yaml.safe_load(text))
    assert again.head.settings["layer"] == {"head_dim": 8} and "window" not in again.head.settings


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_explanation_is_a_recipe_that_means_the_same(path):
    recipe = load_recipe(path)
    text = explain(recipe)
    again = make_recipe(yaml.safe_load(text))
    for section in ("target", "data", "loss", "train", "eval"):
        assert getattr(again, section) == getattr(recipe, section)
    assert recipe.head.settings.items() <= again.head.settings.items()
    defaults = {line.split(":")[0].strip() for line in text.splitlines() if "# default" in line}
    assert "eta" in defaults and "kind" not in defaults


def test_a_recipe_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"recipe\.yaml is no UTF-8 text"):
        load_recipe(path)
