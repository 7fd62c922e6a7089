"""Which strategy a run gets, and what is refused before long work starts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from tiny_run import tiny_recipe

from headstart.training.config.schema import Recipe, make_recipe
from headstart.training.distributed.launcher import deepspeed_settings, resolve_engine

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # DeepSpeed may be missing
    return monkeypatch


def recipe(optimizer: str = "adamw", **parallel: Any) -> Recipe:
    values = tiny_recipe(Path("run"), Path("data"), optimizer=optimizer, accumulate=3, clip=0.5)
    return make_recipe(values.model_dump(exclude_none=True) | {"parallel": parallel})


def test_ddp_unless_something_else_is_asked_for():
    assert resolve_engine(recipe()).parallel.engine == "ddp"
    assert resolve_engine(recipe(engine="fsdp2")).parallel.engine == "fsdp2"


@pytest.mark.parametrize("named", [False, True])
def test_what_accelerate_was_configured_for(environment, tmp_path, named):
    environment.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    environment.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    if named:
        file = tmp_path / "ds.json"
        file.write_text('{"zero_optimization": {"stage": 3}}')
        environment.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    found = resolve_engine(recipe()).parallel
    assert (found.engine, found.deepspeed) == (("zero3", str(file)) if named else ("zero1", None))
    assert resolve_engine(recipe(engine="ddp")).parallel.engine == "ddp"  # the recipe goes first


def test_fsdp_of_accelerate_has_to_be_the_second(environment):
    environment.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        resolve_engine(recipe())
    environment.setenv("FSDP_VERSION", "2")
    assert resolve_engine(recipe()).parallel.engine == "fsdp2"


def test_a_process_alone_spreads_nothing(environment):
    environment.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="this one is alone"):
        resolve_engine(recipe(engine="zero2"))
    for how in ("sharded", "tensor_parallel"):
        with pytest.raises(ValueError, match=f"target is {how}, but this process is alone"):
            resolve_engine(recipe(target=how))
    assert resolve_engine(recipe()).parallel.engine == "ddp"


def test_what_an_engine_cannot_do():
    with pytest.raises(ValueError, match="needs whole matrices"):
        resolve_engine(recipe("muon", engine="zero1"))
    with pytest.raises(ValueError, match=r"parallel\.deepspeed is for zero1"):
        resolve_engine(recipe(engine="fsdp2", deepspeed="ds.json"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"bf16": {"enabled": true}}', r"bf16 \(the recipe has train\.precision\)"),
        ('{"zero_optimization": {"stage": 3}}', r"parallel\.engine=zero2"),
        ('{"optimizer": {"type": "Adam"}}', r"optimizer \(the recipe has train\.optimizer\)"),
        ('{"gradient_clipping": 9}', r"gradient_clipping \(the recipe has train\.clip\)"),
        ("[1]", "no JSON object"),
        ("{", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_deepspeed_file_that_says_something_else(tmp_path, content, said):
    file = tmp_path / "ds.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=said):
        resolve_engine(recipe(engine="zero2", deepspeed=str(file)))


def test_a_deepspeed_file_adds_to_the_recipe(tmp_path):
    file = tmp_path / "ds.json"
    given = {"zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000}}
    file.write_text(json.dumps(given | {"gradient_clipping": "auto", "wall_clock_breakdown": True}))
    settings = deepspeed_settings(recipe(engine="zero2", deepspeed=str(file)))
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["gradient_accumulation_steps"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["wall_clock_breakdown"] is True


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_files_that_come_along_fit(stage):
    file = CONFIGS / "deepspeed" / f"zero{stage}.json"
    settings = deepspeed_settings(recipe(engine=f"zero{stage}", deepspeed=str(file)))
    assert settings["zero_optimization"]["stage"] == stage


def test_deepspeed_that_is_missing(environment):
    environment.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'headstart\[cluster\]'"):
        resolve_engine(recipe(engine="zero2"))
