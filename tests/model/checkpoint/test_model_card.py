"""The model card: usage, measurements, and that a card edited by hand is never overwritten."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import saved_heads
import torch
from huggingface_hub import ModelCard
from jinja2 import UndefinedError
from tiny_checkpoint import TinyCheckpoint
from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import record
from headstart.model.checkpoint.head import read_head_file, save_head
from headstart.model.checkpoint.metadata import Graft, HeadMeta, Lora, Measurement
from headstart.model.checkpoint.model_card import card_template, is_edited, license_of, model_card
from headstart.model.target.target import Target

META = HeadMeta(target="someone/tiny")
MEASUREMENT = Measurement(prompts="talk", tokens=9, acceptance_length=2.25, conditions="here")


def test_edited_cards_are_recognised() -> None:
    card = model_card(tiny_head(tiny_target()), META, Path("nowhere"))
    assert not is_edited(card)
    for changed in (card.replace("Not measured.", "Great."), card + "\nThanks.", "# Mine\n"):
        assert is_edited(changed)
    assert not is_edited("---\nlicense: mit\n---\n")  # as the Hub makes it for a new repository


def test_the_card_shows_all_metadata(tmp_path: Path) -> None:
    known = dict(steps=3, data="a.jsonl", data_hash="ff", start="best", weight_only="int8")
    measured = (
        MEASUREMENT,
        MEASUREMENT.model_copy(update={"acceptance_rates": (0.5, 0.25), "speedup": 1.5}),
    )
    meta = META.model_copy(update=known | {"measured": measured})
    card = model_card(tiny_head(tiny_target(), "mtp"), meta, tmp_path)
    assert "| talk | 9 |  | 2.25 | |  | here |" in card
    assert "| talk | 9 |  | 2.25 | 0.50 0.25 | 1.50 | here |" in card
    training = card.split("## Training\n\n")[1].splitlines()[:8]
    assert [line.split(": ")[-1] for line in training] == [
        *("mtp", "the last hidden state", "48", "3", "a.jsonl", "ff", "best", "int8"),
    ]
    assert "\n\n\n" not in card and not re.search(r"{[{%#]|[}%#]}|Undefined", card)


def test_measurements_are_added_to_a_card_that_was_not_edited(
    tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    fused = Path(shutil.copytree(tiny_checkpoint.fused["mtp"], tmp_path / "fused"))
    head = tiny_head(tiny_target())
    assert record(fused, head, MEASUREMENT)
    card = fused / "README.md"
    assert "| talk | 9 |" in card.read_text() and not is_edited(card.read_text())
    card.write_text(card.read_text() + "\nThanks to my cat.\n")
    mine = card.read_text()
    again = MEASUREMENT.model_copy(update={"prompts": "sums"})
    assert not record(fused, head, again)
    assert card.read_text() == mine
    assert [one.prompts for one in read_head_file(fused).meta.measured] == ["talk", "sums"]
    with pytest.raises(ValueError, match="edited by hand, and fusing again would overwrite it"):
        fuse(tiny_checkpoint.target, tiny_checkpoint.heads["mtp"], fused)
    assert card.read_text() == mine
    card.unlink()
    assert record(fused, head, again) and "| sums | 9 |" in card.read_text()


def served(card: str) -> list[str]:
    return re.findall(r"vllm serve (\S+) .*?\"model\": \"(.*?)\"", card)


def test_commands_name_what_engines_can_serve(tmp_path: Path) -> None:
    target = tiny_target()
    head = tiny_head(target, "eagle3", draft_vocab=16)
    head.set_draft_vocab(torch.arange(16))
    save_head(head, tmp_path / "bare", META)
    save_head(head, tmp_path / "whole", META, with_lm_head=True)
    save_head(
        head,
        tmp_path / "joint",
        META,
        with_lm_head=True,
        beside=lambda part: (part / "adapter").mkdir(),
    )
    places = {name: "me/x" for name in ("bare", "whole", "joint")}
    cards = {
        name: model_card(head, META, tmp_path / name, place=place, alone=True)
        for name, place in places.items()
    }
    assert served(cards["whole"]) == [("someone/tiny", "me/x")]
    assert served(cards["bare"]) == [("fused", "fused/draft_heads")]  # no LM head rows there
    assert served(cards["joint"]) == [("fused", "fused/draft_heads")]  # the target is another
    assert 'model="someone/tiny"' in cards["bare"] and 'model="fused"' in cards["joint"]
    in_folder = model_card(head, META, tmp_path)
    assert served(in_folder) == [("FOLDER", "FOLDER/draft_heads")]
    assert "hf download" not in in_folder
    medusa = model_card(tiny_head(target, "medusa"), META, tmp_path, place="me/x", alone=True)
    assert not served(medusa) and "cannot draft" in medusa


def test_the_license_is_that_of_the_target(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n"
    (tmp_path / "README.target.md").write_text(text)
    terms = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    assert license_of(tmp_path / "README.target.md") == terms
    head = tiny_head(tiny_target())
    for folder, license in ((tmp_path, None), (tmp_path / "none", terms)):
        card = ModelCard(model_card(head, META, folder, license=license)).data.to_dict()
        assert {key: card[key] for key in terms} == terms
    with_license = META.model_copy(update={"license": "mit"})
    assert ModelCard(model_card(head, with_license, tmp_path / "none")).data.license == "mit"


def test_a_recipe_is_shown_without_file_names(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "data.jsonl", start_from=str(tmp_path))
    settings = recipe.decisive()
    assert settings["train"]["lr"] == 1e-2 and settings["loss"]["steps"] == 2
    assert str(tmp_path) not in str(settings)
    assert "lr: 0.01" in model_card(
        tiny_head(tiny_target()), META.model_copy(update={"recipe": settings}), tmp_path
    )


def test_the_card_shows_what_was_measured(
    target: Target, tmp_path: Path, sharded_target: Path
) -> None:
    shutil.copy(sharded_target / "README.md", tmp_path / "README.target.md")
    head, meta = saved_heads.random_head(target, "eagle3"), saved_heads.META
    card = model_card(head, meta, tmp_path)
    for part in ("license: mit", "base_model: someone/tiny-llama", "123,456", "vLLM"):
        assert part in card
    row = "| held-out chat | 2,048 | 8/8 | 2.35 | 0.71 0.42 | 1.62 | 16 nodes, greedy, float32 |"
    assert row in card
    unmeasured = meta.model_copy(update={"measured": ()})
    assert "Not measured." in model_card(head, unmeasured, tmp_path)


# One value for each optional part of the card.
OPTIONS: dict[str, dict[str, Any]] = {
    "joint": {"joint": Lora(rank=4, alpha=8, divergence_weight=1, divergence=0.01)},
    "joint, divergence unknown": {"joint": Lora(rank=4, alpha=8, divergence_weight=1)},
    "grafts": {"grafts": (Graft(source="a", after=1.5), Graft(source="b", before=3, after=2))},
    "replaces": {"replaces": "model.layers.2.*"},
    "measured": {"measured": saved_heads.META.measured},
    "calibrated": {
        "temperatures": (1.5,),
        "rank_acceptance": ((0.5, 0.25),),
        "calibration_positions": (100,),
        "calibration_errors": ((0.2, 0.1),),
        "path_errors": (0.2, 0.1),
    },
    "recipe": {"recipe": {"train": {"lr": 0.5}}},
    "trained": {"steps": 3, "tokens": 1000, "data": "a.jsonl", "weight_only": "nf4"},
}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("kind", ["eagle3", "mtp", "medusa"])
def test_every_branch_of_the_template_renders(tmp_path: Path, kind: str, alone: bool) -> None:
    """With each part alone and with all of them, with and without the code for transformers."""
    head = tiny_head(tiny_target(), kind)
    save_head(head, tmp_path / "head", META)
    code = tmp_path / "head" / "custom_generate" / "generate.py"
    together: dict[str, Any] = {}
    for option in OPTIONS.values():
        together |= option
    for update in ({}, *OPTIONS.values(), together):
        card = model_card(head, META.model_copy(update=update), tmp_path / "head", alone=alone)
        assert card.count("```") % 2 == 0 and not re.search(r"{[{%#]|[}%#]}|None", card)
    code.parent.mkdir()
    code.touch()
    card = model_card(head, META, tmp_path / "head", alone=alone)
    assert '"trust_remote_code": True' in card


def test_an_undefined_name_in_the_template_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        card_template().render(name="tiny")
