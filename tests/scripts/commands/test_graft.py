"""`headstart graft`: transfers a head to a changed target and reports the loss."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from benchmarking import benchmark
from chat_model import tokenizer, write_recipe
from run_command import refused, run
from safetensors.torch import load_file, save_file
from tiny_run import tiny_head
from transformers import LlamaConfig, LlamaForCausalLM

from headstart.inference.benchmark.metrics import AUTOREGRESSIVE
from headstart.inference.config import SpeculativeConfig
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.checkpoint.metadata import HeadMeta, Lora, Measurement
from headstart.model.checkpoint.model_card import model_card
from headstart.model.hub.upload import publishable
from headstart.model.target.load import load_target
from headstart.model.target.weights_hash import target_hash
from headstart.scripts.commands.graft import MAX_LOSS, lost_share

pytestmark = pytest.mark.usefixtures("wide")

SMALL, STRONG = 1.02, 1e4  # changes of a target
OLD = Measurement(prompts="old talk", tokens=9, acceptance_length=3.25, conditions="there")
META = HeadMeta(
    target="someone/tiny",
    license="mit",
    steps=2,
    tokens=4321,
    data="responses.jsonl",
    data_hash="ab" * 32,
    replaces="model.layers.2.*",
    recipe={"train": {"lr": 0.5}},
    temperatures=(1.5,),
    rank_acceptance=((0.5, 0.25),),
    calibration_positions=(100,),
    calibration_errors=((0.2, 0.1),),
    path_errors=(0.2, 0.1),
    measured=(OLD,),
)


def follow(folder: Path, step: int) -> Path:
    """A chat model whose next token is the one `step` ids on, with small contributions of the
    layers."""
    made = tokenizer()
    torch.manual_seed(0)
    size = len(made)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.mul_(0.01)
        model.get_output_embeddings().weight.copy_(torch.eye(size).roll(step, 0))
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return follow(tmp_path_factory.mktemp("source"), 1)


@pytest.fixture(scope="module")
def fused(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a head that follows the rule of its target by itself, not only by the LM head."""
    folder = tmp_path_factory.mktemp("fused")
    target = load_target(source)
    head = tiny_head(target, "mtp")
    size = target.hidden_size
    with torch.no_grad():
        for name, weight in head.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        embedding, hidden = head.eh_proj.weight.split(size, 1)
        embedding.copy_(torch.eye(size))
        hidden.zero_()
    save_head(head, folder / "head", META)
    fuse(source, folder / "head", folder / "fused")
    return folder / "fused"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "talk.jsonl"
    lines = [{"id": f"p{n}", "prompt": "say " + "ab" * n} for n in range(1, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def settings(prompts: Path) -> tuple[object, ...]:
    return ("--prompts", prompts, "--limit", 2, "--max-new-tokens", 16)


def change(source: Path, out: Path, factor: float) -> Path:
    """A fine-tune: scales the contributions of the layers."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    for name, weight in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            weight *= factor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tuned\n")
    return out


def compared(output: str) -> list[str]:
    """The first two cells of the table's rows."""
    return [
        " ".join(line.replace("\u2502", " ").split()[:3])
        for line in output.splitlines()
        if re.match(r"\W*(original|changed) target +\u2502", line)
    ]


def test_a_strong_change_lowers_acceptance_and_retraining_is_recommended(
    fused, source, prompts, settings, tmp_path, monkeypatch
):
    changed = change(source, tmp_path / "tuned", STRONG)
    out = tmp_path / "out"
    output = run("graft", fused, changed, out, *settings).output
    assert compared(output) == ["original target 2/2", "changed target 2/2"]
    assert "2 of 2 responses equal the changed target's" in output

    target, head = load_fused(out)
    file = read_head_file(out)
    assert file.target_hash == target_hash(target) != read_head_file(fused).target_hash
    assert (out / "model.safetensors").read_bytes() == (changed / "model.safetensors").read_bytes()
    old = load_head(fused, load_target(fused))
    assert all(
        torch.equal(tensor, old.state_dict()[name]) for name, tensor in head.state_dict().items()
    )
    ids = [[5, 6, 7], [60, 2]]
    found = benchmark(target, {"ours": SpeculativeConfig(head)}, ids, max_new_tokens=20)
    assert found["ours"].identical == found[AUTOREGRESSIVE].prompts == 2

    (graft,) = file.meta.grafts
    assert graft.source == file.meta.trained_on == "someone/tiny"
    assert graft.before > 1.5 > graft.after and lost_share(graft.before, graft.after) > MAX_LOSS
    lost = lost_share(graft.before, graft.after)
    assert f"Lost: {lost:.0%} of the head's gain" in output
    assert f"{graft.before:.2f} before, {graft.after:.2f} now" in output
    assert "RETRAIN IT" in output
    # The commands are what a user can run.
    recipe = write_recipe(tmp_path / "r.yaml", Path("none"), Path("none"), Path("none"), steps=2)
    monkeypatch.chdir(tmp_path)
    given = {"PROMPTS": prompts, "RECIPE": recipe, "FUSED": "again"}
    lines = [line.split()[1:] for line in output.splitlines() if line.startswith("  headstart ")]
    assert [line[0] for line in lines] == ["data", "train", "fuse"]
    for line in lines:
        run(*(given.get(word, word) for word in line))
    meta = read_head_file("again").meta
    assert meta.start == str(out) and meta.target == str(changed) and not meta.grafts


def test_metadata_of_the_training_is_kept_and_of_the_old_target_dropped(
    fused, source, settings, tmp_path
):
    changed = change(source, tmp_path / "tuned", STRONG)
    out = tmp_path / "out"
    assert f"headstart calibrate {out}" in run("graft", fused, changed, out, *settings).output
    meta = read_head_file(out).meta
    for name in ("steps", "tokens", "data", "data_hash", "recipe"):
        assert getattr(meta, name) == getattr(META, name)
    for name in (
        "temperatures",
        "rank_acceptance",
        "calibration_positions",
        "path_errors",
        "replaces",
    ):
        assert not getattr(meta, name)
    assert load_fused(out)[1].temperatures == ()
    (measured,) = meta.measured
    (graft,) = meta.grafts
    assert measured.acceptance_length == graft.after and measured.identical == 2
    assert measured.prompts == "talk.jsonl, 2 prompts, at most 16 tokens each"
    card = (out / "README.md").read_text()
    assert "TRAINED ON ANOTHER TARGET, someone/tiny and" in card
    row = f"| someone/tiny | {changed} | {graft.before:.2f} | {graft.after:.2f} |"
    assert row in card and "- trained on: someone/tiny" in card and "4,321" in card
    assert "license: apache-2.0" in card and "old talk" not in card and "Calibration" not in card
    assert f"| {measured.prompts} | {measured.tokens} | 2/2 | {graft.after:.2f} |" in card


def test_a_small_change_loses_little(fused, source, settings, tmp_path):
    changed = change(source, tmp_path / "tuned", SMALL)
    output = run("graft", fused, changed, tmp_path / "out", *settings).output
    (graft,) = read_head_file(tmp_path / "out").meta.grafts
    assert graft.after > 1.5 and lost_share(graft.before, graft.after) <= MAX_LOSS
    assert "Nothing was lost" in output and "RETRAIN" not in output and "train.start" not in output


@pytest.mark.parametrize(
    ("before", "after", "share"), [(3.0, 2.8, 0.1), (3.0, 1.0, 1.0), (2.0, 2.5, -0.5), (1.0, 1, 0)]
)
def test_the_loss_is_relative_to_the_gain(before, after, share):
    assert lost_share(before, after) == pytest.approx(share)


def test_a_head_alone_is_compared_if_its_target_is_on_disk(fused, source, settings, tmp_path):
    changed = change(source, tmp_path / "tuned", STRONG)
    head = fused.parent / "head"
    output = run("graft", head, changed, tmp_path / "alone", *settings).output
    assert compared(output) == ["changed target 2/2"]
    assert "The loss is unknown: the original target, someone/tiny" in output
    assert "If that is too little, continue training the head" in output
    (graft,) = read_head_file(tmp_path / "alone").meta.grafts
    assert graft.before is None and graft.after > 0
    assert "| someone/tiny |" in (tmp_path / "alone" / "README.md").read_text()

    target = load_target(source)
    near = META.model_copy(update={"target": str(source)})
    save_head(load_head(head, target), tmp_path / "near", near)
    run("graft", tmp_path / "near", changed, tmp_path / "known", *settings)
    (graft,) = read_head_file(tmp_path / "known").meta.grafts
    assert graft.source == str(source) and graft.before > 1.5


def test_a_target_that_was_changed_in_place(fused, source, settings, tmp_path):
    """The error on loading names `graft`, which may write into the same folder."""
    place = Path(shutil.copytree(fused, tmp_path / "place"))
    other = change(source, tmp_path / "tuned", STRONG)
    shutil.copy(other / "model.safetensors", place / "model.safetensors")
    message = refused("eval", place, *settings)
    assert "hash" in message and f"headstart graft {place} {place} OUT" in message
    output = run("graft", place, place, place, *settings).output
    assert "The loss is unknown" in output
    assert load_fused(place)[1].kind == "mtp"
    assert read_head_file(place).meta.grafts[0].before is None


def test_every_transfer_is_recorded(fused, source, settings, tmp_path):
    first = change(source, tmp_path / "tuned", SMALL)
    second = change(source, tmp_path / "merged", STRONG)
    run("graft", fused, first, tmp_path / "one", *settings)
    run("graft", tmp_path / "one", second, tmp_path / "two", *settings)
    meta = read_head_file(tmp_path / "two").meta
    assert [one.source for one in meta.grafts] == ["someone/tiny", str(first)]
    assert meta.trained_on == "someone/tiny" and meta.target == str(second)
    card = (tmp_path / "two" / "README.md").read_text()
    assert f"| someone/tiny | {first} |" in card and f"| {first} | {second} |" in card
    public = publishable(meta, "someone/merged")
    assert [one.source for one in public.grafts] == ["someone/tiny", "tuned"]


def test_an_original_that_is_no_longer_there(fused, source, settings, tmp_path):
    changed = change(source, tmp_path / "tuned", STRONG)
    broken = Path(shutil.copytree(fused, tmp_path / "broken"))
    other = change(source, tmp_path / "other", STRONG)
    shutil.copy(other / "model.safetensors", broken / "model.safetensors")
    output = run("graft", broken, changed, tmp_path / "out", *settings).output
    assert f"the weights of {broken} are no longer those that the head was trained on" in output


def sized(folder: Path, **sizes: int) -> Path:
    made = tokenizer()
    settings = {
        "vocab_size": len(made), "hidden_size": len(made), "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    } | sizes  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"hidden_size": 32}, "hidden size"),
        ({"vocab_size": 300}, "vocabulary"),
        ({"num_hidden_layers": 3}, "2 layers, but .* has 3"),
    ],
)
def test_other_sizes_are_an_error_before_anything_is_loaded(
    fused, tmp_path, monkeypatch, sizes, expected
):
    other = sized(tmp_path / "other", **sizes)
    monkeypatch.setattr("headstart.scripts.commands.graft.load_target", None)
    message = refused("graft", fused, other, tmp_path / "out")
    assert re.search(expected, message) and not (tmp_path / "out").exists()


def test_another_vocabulary_of_the_same_size_is_an_error(fused, source, tmp_path, monkeypatch):
    other = change(source, tmp_path / "tuned", SMALL)
    path = other / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(values))
    monkeypatch.setattr("headstart.scripts.commands.graft.load_target", None)
    assert "2 token ids stand for other text" in refused("graft", fused, other, tmp_path / "out")


def test_added_tokens_may_have_other_names(fused, source, settings, tmp_path):
    changed = change(source, tmp_path / "tuned", SMALL)
    for file in changed.glob("*"):
        if file.suffix in (".json", ".jinja"):
            file.write_text(file.read_text().replace("<|im_start|>", "<|start|>"))
    run("graft", fused, changed, tmp_path / "out", *settings)


def test_an_unchanged_target_is_an_error(fused, source, settings, tmp_path):
    message = refused("graft", fused, source, tmp_path / "out", *settings)
    assert (
        "nothing has to be carried over" in message
        and f"headstart fuse {source} {fused} OUT" in message
    )


def test_other_files_are_not_replaced(fused, source, tmp_path, monkeypatch):
    changed = change(source, tmp_path / "tuned", STRONG)
    monkeypatch.setattr("headstart.scripts.commands.graft.load_target", None)
    assert "holds other files" in refused("graft", fused, changed, changed)
    assert "holds the original target" in refused("graft", fused, changed, fused)
    edited = Path(shutil.copytree(fused, tmp_path / "edited"))
    (edited / "README.md").write_text("# Mine\n")
    assert "edited by hand" in refused("graft", fused, changed, edited)


def test_a_head_whose_target_is_not_merged_yet_is_an_error(fused, source, tmp_path):
    changed = change(source, tmp_path / "tuned", STRONG)
    joint = Path(shutil.copytree(fused.parent / "head", tmp_path / "joint"))
    (joint / "adapter").mkdir()
    message = refused("graft", joint, changed, tmp_path / "out")
    assert "trained jointly with its target" in message and "headstart fuse someone/tiny" in message
    with pytest.raises(ValueError, match="trained jointly with its target"):
        fuse(changed, joint, tmp_path / "out", regraft=META)


def test_the_card_does_not_say_that_the_new_target_was_adapted(fused, source):
    head = load_head(fused, load_target(source))
    joint = META.model_copy(
        update={"joint": Lora(rank=4, alpha=8, divergence_weight=1, divergence=0.01)}
    )
    assert "someone/tiny, CHANGED jointly" in model_card(head, joint, fused)
    card = model_card(head, joint.grafted("me/new", 2.5, 2.0, OLD), fused)
    assert "The weights of me/new, unchanged, and" in card
    assert "someone/tiny, CHANGED jointly with the head (LoRA of rank 4" in card
