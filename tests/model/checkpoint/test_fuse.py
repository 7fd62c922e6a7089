"""The fused checkpoint: the target's bytes untouched, the head's bytes kept, damage refused."""

from __future__ import annotations

import errno
import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from headstart.model.checkpoint.custom_generate.drafting import KINDS
from headstart.model.checkpoint.custom_generate.write import FILES
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.checkpoint.metadata import HeadMeta, Measurement
from headstart.model.checkpoint.model_card import model_card
from headstart.model.heads.common.base import DraftHead, kinds, make_head
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target
from headstart.model.target.weights_hash import target_hash
from headstart.scripts.options.default_checkpoint import shipped_head

VOCAB, DRAFT_VOCAB = 97, 31
META = HeadMeta(
    target="someone/tiny-llama",
    steps=3,
    tokens=123456,
    temperatures=(1.0, 1.25),
    measured=(
        Measurement(
            prompts="held-out chat",
            tokens=2048,
            acceptance_length=2.354,
            acceptance_rates=(0.71, 0.42),
            speedup=1.62,
            responses=8,
            identical=8,
            conditions="16 nodes, greedy, float32",
        ),
    ),
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target, saved as transformers saves it, in several files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    folder = tmp_path_factory.mktemp("target")
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The tiny target\n")
    return folder


@pytest.fixture(scope="module")
def target(plain: Path) -> Target:
    return load_target(plain)


def trained(target: Target, kind: str, **settings: object) -> DraftHead:
    """A head with random weights and a draft vocabulary that is not the first few tokens."""
    torch.manual_seed(1)
    taps = {"taps": (1, 2, 4)} if kind == "eagle3" else {}
    head = make_head(target, kind, {"draft_vocab": DRAFT_VOCAB, **taps, **settings})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.set_draft_vocab(torch.randperm(VOCAB)[:DRAFT_VOCAB])
    return head


@pytest.fixture
def saved(target: Target, tmp_path: Path) -> Path:
    save_head(trained(target, "eagle3"), tmp_path / "head", META)
    return tmp_path / "head"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_save_keeps_every_byte(
    plain: Path, target: Target, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    head = trained(target, kind)
    save_head(head, tmp_path / "one", META)
    other = load_target(plain, dtype=dtype)
    again = load_head(tmp_path / "one", other)
    drafts_in = torch.float32 if other.drafts_in_int8 else dtype  # integers are made from floats
    assert {p.dtype for p in again.parameters()} == {drafts_in}
    save_head(again, tmp_path / "two", read_head_file(tmp_path / "one").meta)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert again.taps == head.taps and again.max_depth == head.max_depth
    assert torch.equal(again.draft_ids, head.draft_ids)
    state = again.state_dict()
    for name, tensor in head.state_dict().items():
        assert torch.equal(state[name].to(torch.bfloat16), tensor.to(torch.bfloat16)), name


@pytest.mark.parametrize("kind", kinds())
def test_fused_folder_is_the_target_and_the_head(
    plain: Path, target: Target, tmp_path: Path, kind: str
) -> None:
    head = trained(target, kind)
    save_head(head, tmp_path / "head", META)
    fuse(plain, tmp_path / "head", tmp_path / "out" / "fused")
    out = tmp_path / "out" / "fused"
    assert [path.name for path in out.parent.iterdir()] == ["fused"]  # nothing left beside
    ours, theirs = files(out), files(plain)
    theirs["README.target.md"] = theirs.pop("README.md")
    extra = {"README.md", "draft_heads/config.json", "draft_heads/model.safetensors"}
    extra |= set(FILES) if kind in KINDS else set()  # transformers drafts with these
    assert ours.keys() == theirs.keys() | extra
    assert all(ours[name] == content for name, content in theirs.items())

    again_target, again = load_fused(out)
    assert target_hash(again_target) == target_hash(target)
    assert again.kind == kind and read_head_file(out).meta == META
    assert all(
        torch.equal(tensor, head.state_dict()[name].to(torch.bfloat16).to(tensor.dtype))
        for name, tensor in again.state_dict().items()
    )
    # Fusing anew replaces the folder; the target's own card is not taken for ours.
    fuse(out, out / "draft_heads", out)
    assert files(out) == ours


def test_transformers_opens_the_plain_target_silently(
    plain: Path,
    saved: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fuse(plain, saved, tmp_path / "fused")
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / "fused", output_loading_info=True
        )
    assert not caplog.records
    assert not any(report.values())
    tokens = torch.arange(12)[None]
    expected = AutoModelForCausalLM.from_pretrained(plain)(tokens).logits
    assert torch.equal(model(tokens).logits, expected)


def test_linked_weights_share_the_space(plain: Path, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "plain")
    fuse(tmp_path / "plain", saved, tmp_path / "fused", link=True)
    name = "config.json"
    assert not (tmp_path / "fused" / name).samefile(tmp_path / "plain" / name)
    shards = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert all((tmp_path / "fused" / shard.name).samefile(shard) for shard in shards)


def test_hash_knows_weights_not_files(plain: Path, target: Target, tmp_path: Path) -> None:
    one_file = tmp_path / "one"
    target.model.save_pretrained(one_file)
    narrow = tmp_path / "narrow"
    LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).save_pretrained(narrow)
    for folder in (one_file, narrow):
        assert target_hash(load_target(folder)) == target_hash(target)
    changed = LlamaForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        changed.model.layers[3].mlp.up_proj.weight[5, 7] += 0.01
    assert target_hash(wrap_target(changed)) != target_hash(target)


def test_another_target_is_refused(plain: Path, saved: Path) -> None:
    other = LlamaForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        other.model.norm.weight[0] = 1.5
    with pytest.raises(ValueError, match="trained on someone/tiny-llama"):
        load_head(saved, wrap_target(other))


def test_a_full_disk_leaves_the_old_head(
    target: Target, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(saved.parent)

    def full(path: Path, content: bytes) -> None:
        path.write_text(content[:99].hex())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        save_head(trained(target, "mtp"), saved, META)
    assert files(saved.parent) == before


def test_a_full_disk_leaves_the_old_checkpoint(
    plain: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse(plain, saved, tmp_path / "fused")
    before = files(tmp_path)

    def full(source: Path, to: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        fuse(plain, saved, tmp_path / "fused")
    assert files(tmp_path) == before


def test_a_folder_with_other_files_is_never_replaced(
    plain: Path, target: Target, saved: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"):
        save_head(trained(target, "mtp"), tmp_path / "mine", META)
    with pytest.raises(ValueError, match="holds other files"):
        fuse(plain, saved, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds other files"):
        fuse(plain, saved, plain)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def edit_tensors(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["fc.weight"]
    elif change == "extra":
        tensors["fc.bias"] = torch.zeros(3)
    elif change == "shape":
        tensors["fc.weight"] = tensors["fc.weight"][:-1]
    elif change == "nan":
        tensors["midlayer.mlp.up_proj.weight"][2, 3] = torch.nan
    elif change == "vocabulary":
        tensors["d2t"] += VOCAB
    else:
        tensors["lm_head.weight"] = torch.zeros(DRAFT_VOCAB, 48)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"missing \['fc.weight'\]"),
        ("extra", r"unknown \['fc.bias'\]"),
        ("shape", r"fc.weight as torch.bfloat16 \[47, 144\]"),
        ("nan", "midlayer.mlp.up_proj.weight that are not finite"),
        ("vocabulary", "names tokens that do not exist"),
        ("lm_head", "lm_head.weight of its own"),
    ],
)
def test_damaged_tensors_are_refused(target: Target, saved: Path, change: str, says: str) -> None:
    edit_tensors(saved, change)
    with pytest.raises(ValueError, match=says):
        load_head(saved, target)


def test_cut_and_missing_files_are_refused(target: Target, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_head(saved, target)
    path.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_head(saved, target)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds no draft head"):
        load_head(saved, target)
    with pytest.raises(ValueError, match="not a fused checkpoint"):
        load_fused(saved)


def test_unknown_settings_are_refused(target: Target, saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    config["headstart"]["head"]["colour"] = "blue"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="colour"):
        load_head(saved, target)


def test_eagle3_folder_speaks_to_engines(plain: Path, target: Target, tmp_path: Path) -> None:
    """The facts each engine reads: vLLM and llama.cpp count layer inputs, SGLang layer outputs."""
    head = trained(target, "eagle3")
    save_head(head, tmp_path / "head", META)
    fuse(plain, tmp_path / "head", tmp_path / "fused")
    heads = tmp_path / "fused" / "draft_heads"
    config = json.loads((heads / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3, 5]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]
    assert config["num_aux_hidden_states"] == 3
    assert config["norm_before_residual"] is False and config["tie_word_embeddings"] is False
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert (config["vocab_size"], config["draft_vocab_size"]) == (VOCAB, DRAFT_VOCAB)
    tensors = load_file(heads / "model.safetensors")
    layer = {
        f"midlayer.{name}.weight"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            *("input_layernorm", "hidden_norm", "post_attention_layernorm"),
        )
    }
    assert tensors.keys() == layer | {"fc.weight", "norm.weight", "lm_head.weight", "d2t"}
    ids = tensors["d2t"] + torch.arange(DRAFT_VOCAB)
    assert torch.equal(ids, head.draft_ids)
    rows = target.model.lm_head.weight[ids].to(torch.bfloat16)
    assert torch.equal(tensors["lm_head.weight"], rows)
    assert tensors["midlayer.self_attn.q_proj.weight"].shape == (48, 96)


def test_a_layout_that_engines_lack_is_not_offered_to_them(target: Target, tmp_path: Path) -> None:
    head = trained(target, "eagle3", attention_layout="kvshare")
    save_head(head, tmp_path / "head", META, with_lm_head=True)
    assert json.loads((tmp_path / "head" / "config.json").read_text()).keys() == {"headstart"}
    assert "layout" in model_card(head, META, tmp_path)


def test_mtp_has_the_names_of_glm(target: Target, tmp_path: Path) -> None:
    save_head(trained(target, "mtp"), tmp_path / "head", META)
    names = load_file(tmp_path / "head" / "model.safetensors").keys()
    prefix = f"model.layers.{target.num_layers}."
    assert {"enorm", "hnorm", "eh_proj", "shared_head.norm"} <= {
        name.removeprefix(prefix).removesuffix(".weight") for name in names
    }
    assert {name for name in names if not name.startswith(prefix)} == {"d2t"}


def test_model_card_tells_what_was_measured(target: Target, tmp_path: Path, plain: Path) -> None:
    shutil.copy(plain / "README.md", tmp_path / "README.target.md")
    card = model_card(trained(target, "eagle3"), META, tmp_path)
    for fact in ("license: mit", "base_model: someone/tiny-llama", "123,456", "vLLM"):
        assert fact in card
    row = "| held-out chat | 2,048 | 8/8 | 2.35 | 0.71 0.42 | 1.62 | 16 nodes, greedy, float32 |"
    assert row in card
    unmeasured = META.model_copy(update={"measured": ()})
    assert "Not measured." in model_card(trained(target, "eagle3"), unmeasured, tmp_path)


@pytest.mark.slow
def test_a_gguf_target_becomes_a_plain_folder(smollm2: Path, tmp_path: Path) -> None:
    """The real model: written out, hashed alike, and its tokenizer comes along."""
    target = load_target(smollm2)
    fuse(smollm2, shipped_head(), tmp_path / "fused")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fused", output_loading_info=True
    )
    assert not any(report.values())
    assert target_hash(wrap_target(model)) == target_hash(target)
    tokens = torch.tensor([target.tokenizer("The capital of France is")["input_ids"]])
    assert torch.equal(model(tokens).logits, target.model(tokens).logits)
    again, head = load_fused(tmp_path / "fused")
    assert again.tokenizer.decode(tokens[0]).endswith("France is")
    assert torch.equal(again.forward(tokens).logits_BTV, target.forward(tokens).logits_BTV)
    assert head.kind == load_head(shipped_head(), target).kind
