"""The model card: how to use what is there, and that a hand's work is never written over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_run import tiny_head, tiny_recipe, tiny_target

from headstart.model.checkpoint.download import hub_name
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import record
from headstart.model.checkpoint.head import read_head_file, save_head
from headstart.model.checkpoint.metadata import HeadMeta, Measurement
from headstart.model.checkpoint.model_card import is_edited, license_of, model_card
from headstart.model.heads.common.base import make_head
from headstart.model.hub.upload import publishable
from headstart.model.target.load import load_target

META = HeadMeta(target="someone/tiny")
FIGURE = Measurement(prompts="talk", tokens=9, acceptance_length=2.25, conditions="here")


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    tiny_target().model.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / ".cache" / "huggingface").mkdir(parents=True)  # as a download leaves it
    target = load_target(tmp_path / "plain")
    torch.manual_seed(1)
    save_head(make_head(target, "mtp", {}), tmp_path / "head", META)
    fuse(tmp_path / "plain", tmp_path / "head", tmp_path / "fused")
    assert not (tmp_path / "fused" / ".cache").exists()
    return tmp_path / "fused"


def test_a_card_knows_whether_it_was_edited() -> None:
    card = model_card(tiny_head(tiny_target()), META, Path("nowhere"))
    assert not is_edited(card)
    for changed in (card.replace("Not measured.", "Great."), card + "\nThanks.", "# Mine\n"):
        assert is_edited(changed)
    assert not is_edited("---\nlicense: mit\n---\n")  # as the Hub makes it for a new repository


def test_the_card_has_a_line_for_all_that_is_known(tmp_path: Path) -> None:
    known = dict(steps=3, data="a.jsonl", data_hash="ff", start="best", weight_only="int8")
    figures = (FIGURE, FIGURE.model_copy(update={"acceptance_rates": (0.5, 0.25), "speedup": 1.5}))
    meta = META.model_copy(update=known | {"measured": figures})
    card = model_card(tiny_head(tiny_target(), "mtp"), meta, tmp_path)
    assert "| talk | 9 |  | 2.25 | |  | here |" in card
    assert "| talk | 9 |  | 2.25 | 0.50 0.25 | 1.50 | here |" in card
    training = card.split("## Training\n\n")[1].splitlines()[:8]
    assert [line.split(": ")[-1] for line in training] == [
        *("mtp", "the last hidden state", "48", "3", "a.jsonl", "ff", "best", "int8"),
    ]
    assert "\n\n\n" not in card and not re.search(r"{[{%#]|[}%#]}|Undefined", card)


def test_figures_go_into_a_card_that_nobody_edited(fused: Path) -> None:
    head = tiny_head(tiny_target())
    assert record(fused, head, FIGURE)
    card = fused / "README.md"
    assert "| talk | 9 |" in card.read_text() and not is_edited(card.read_text())
    card.write_text(card.read_text() + "\nThanks to my cat.\n")
    mine = card.read_text()
    again = FIGURE.model_copy(update={"prompts": "sums"})
    assert not record(fused, head, again)
    assert card.read_text() == mine
    assert [one.prompts for one in read_head_file(fused).meta.measured] == ["talk", "sums"]
    with pytest.raises(ValueError, match="edited by hand, and fusing again would overwrite it"):
        fuse(fused.parent / "plain", fused.parent / "head", fused)
    assert card.read_text() == mine
    card.unlink()
    assert record(fused, head, again) and "| sums | 9 |" in card.read_text()


def served(card: str) -> list[str]:
    return re.findall(r"vllm serve (\S+) .*?\"model\": \"(.*?)\"", card)


def test_engines_are_given_what_they_can_serve(tmp_path: Path) -> None:
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


def test_the_licence_is_the_targets(tmp_path: Path) -> None:
    text = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n"
    (tmp_path / "README.target.md").write_text(text)
    terms = {"license": "other", "license_name": "tiny", "license_link": "LICENSE"}
    assert license_of(tmp_path / "README.target.md") == terms
    head = tiny_head(tiny_target())
    for folder, licence in ((tmp_path, None), (tmp_path / "none", terms)):
        card = ModelCard(model_card(head, META, folder, license=licence)).data.to_dict()
        assert {key: card[key] for key in terms} == terms
    noted = META.model_copy(update={"license": "mit"})
    assert ModelCard(model_card(head, noted, tmp_path / "none")).data.license == "mit"


def test_a_recipe_is_told_without_names_of_files(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", tmp_path / "data.jsonl", start_from=str(tmp_path))
    told = recipe.decisive()
    assert told["train"]["lr"] == 1e-2 and told["loss"]["steps"] == 2
    assert str(tmp_path) not in str(told)
    assert "lr: 0.01" in model_card(
        tiny_head(tiny_target()), META.model_copy(update={"recipe": told}), tmp_path
    )


def test_what_is_published_names_no_place_on_this_machine() -> None:
    deep = "/".join(["", "srv", "me", "secret"])
    meta = HeadMeta(
        target=f"{deep}/tiny", data=f"{deep}/a.jsonl, someone/chats", start="../runs/best"
    )
    public = publishable(meta, None)
    assert (public.target, public.data, public.start) == ("tiny", "a.jsonl, someone/chats", "best")
    words = HeadMeta(target="x", data="answers of the target and/or mine, to 9,474 prompts")
    assert publishable(words, "someone/tiny").data == words.data


@pytest.mark.parametrize(
    ("name", "means"),
    [
        ("me/tiny", ("me/tiny", None)),
        ("me/tiny@v1.0", ("me/tiny", "v1.0")),
        ("me/tiny@refs/pr/1", ("me/tiny", "refs/pr/1")),
        (Path("me/tiny"), ("me/tiny", None)),
        ("tiny", None),
        ("../tiny", None),
        ("~/tiny", None),
        ("a/b/c", None),
        ("here/tiny", None),
    ],
)
def test_a_folder_is_taken_before_the_hub(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str | Path,
    means: tuple[str, str | None] | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    assert hub_name(name) == means
