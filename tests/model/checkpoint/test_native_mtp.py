"""Native MTP layers: loaded exactly, exact decoding with them, written back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import build, prompts
from mtp_checkpoints import FAMILIES, GLM, Reference, write
from run_command import refused, run
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from headstart.inference import SpeculativeModel
from headstart.model.checkpoint.adopt import adopt
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import load_head, read_head_file, save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads import mtp
from headstart.model.heads.common.base import make_head
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.modules import cache_kwarg
from headstart.model.target.target import Target
from headstart.model.tree.grow import Children
from headstart.model.tree.shape import TreeShape
from headstart.scripts.commands.plan import shapes
from headstart.training.config.schema import make_recipe
from headstart.training.cost_estimate import flops_per_token, memory

NEAR = {"rtol": 1e-4, "atol": 1e-4}
STEPS, LENGTH = 3, 14


@pytest.mark.parametrize("name", FAMILIES)
def test_every_draft_step_equals_the_published_formula(name: str, tmp_path: Path) -> None:
    layer = write(name, tmp_path / "model")
    adopt(tmp_path / "model", tmp_path / "head")
    target = load_target(tmp_path / "model", dtype=torch.float32)
    head = load_head_for_training(tmp_path / "head", target)
    # transformers' layers with experts compute in float32 at most.
    plain = head.config.family is None
    if plain:
        head.double()
    assert read_head_file(tmp_path / "head").head["kind"] == "mtp"
    generator = torch.Generator().manual_seed(5)
    tokens_BT = torch.randint(4, 96, (1, LENGTH), generator=generator)
    output = target.forward(tokens_BT, taps=head.taps)
    # MiMo takes the hidden state before the target's final norm, the others after it.
    hidden_TD = output.lm_head_input_BTD[0].double()
    if name == "mimo":
        with torch.no_grad():
            states = target.model(tokens_BT, output_hidden_states=True)
        norm = target.model.model.norm
        raw_TD = output.hidden_states[target.num_layers - 1][0]
        torch.testing.assert_close(norm(raw_TD), states.hidden_states[-1][0])
        hidden_TD = raw_TD.double()
    embedded = [target.embed(tokens_BT.roll(-1 - step, 1))[0].double() for step in range(STEPS)]
    expected = Reference(name, layer).steps(embedded, hidden_TD)
    with torch.no_grad():
        got = head.unroll(output, tokens_BT, STEPS)
    tolerance = 1e-12 if plain else 2e-5
    for step in range(STEPS):
        mine, theirs = got[step][0].double(), expected[step]
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        weight = target.model.lm_head.weight.double()
        torch.testing.assert_close(
            mine @ weight.T, theirs @ weight.T, rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name != "llama"])
def adopted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint (`model`) and its adopted head (`head`)."""
    folder = tmp_path_factory.mktemp(request.param)
    write(request.param, folder / "model")
    adopt(folder / "model", folder / "head")
    return folder


def load_head_for_training(folder: Path, target: Target) -> mtp.Head:
    """Without the quantised and fused linears of decoding."""
    opened = load_head(folder, target)
    head = mtp.Head(opened.config)
    head.load_state_dict(opened.state_dict())
    head.bind(target)
    return head


def test_training_equals_sequential_drafting(adopted: Path) -> None:
    """The target's own layer computes the same in drafting as over a sequence."""
    target = load_target(adopted / "model", dtype=torch.float32)
    head = load_head_for_training(adopted / "head", target)
    tokens_BT = prompts([LENGTH], seed=3)[0][None]
    output = target.forward(tokens_BT, taps=head.taps)
    with torch.no_grad():
        trained = head.unroll(output, tokens_BT, STEPS)
    for anchor in range(LENGTH - STEPS - 1):
        follow, hidden = tokens_BT[0, anchor + 2 :].tolist(), []

        def candidates(
            hidden_BFD: Tensor,
            width: int,
            depth: int = 0,
            follow: list[int] = follow,
            hidden: list[Tensor] = hidden,
        ) -> Children:
            hidden.append(hidden_BFD[:, 0])
            token = follow[len(hidden) - 1]
            return torch.zeros(1, 1, 1), torch.full((1, 1, 1), token)

        head.candidates = candidates  # type: ignore[method-assign]
        rows = output.gather(torch.arange(anchor + 1)[None])
        counts_B = torch.tensor([anchor + 1])
        state = head.advance(head.start(1), rows, tokens_BT[:, 1 : anchor + 2], counts_B)
        head.draft(state, TreeShape.chain(STEPS))
        for step in range(STEPS):
            torch.testing.assert_close(hidden[step], trained[step][:, anchor], **NEAR)


def test_router_weights_stay_in_full_precision(tmp_path: Path) -> None:
    """In the file and in a converted head; rotary frequencies too."""
    layer = write("glm4_moe", tmp_path / "model")
    head = adopt(tmp_path / "model", tmp_path / "head")
    name = "mlp.gate.e_score_correction_bias"
    stored = load_file(tmp_path / "head" / "model.safetensors")[GLM + name]
    assert stored.dtype == torch.float32 and torch.equal(stored, layer[name])
    frequencies = head.layer.rotary.inv_freq.clone()
    head.bfloat16()
    assert head.layer.block.self_attn.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(head.layer.block.mlp.gate.e_score_correction_bias, layer[name])
    assert torch.equal(head.layer.rotary.inv_freq, frequencies)


def test_the_output_is_the_targets_own(adopted: Path) -> None:
    """With a tree, and with the head in int8 where it drafts in int8."""
    target = load_target(adopted / "model", dtype=torch.float32)
    model = SpeculativeModel(target, load_head(adopted / "head", target))
    for prompt in prompts([7, 12]):
        settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
        expected = target.model.generate(prompt[None], **settings)
        assert torch.equal(model.generate(prompt[None], **settings), expected)
        assert model.last_stats.acceptance_length >= 1


def shards(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def differing(before: Path, after: Path) -> set[str]:
    """Names of tensors that are not the same, of two checkpoints with the same ones."""
    found = set()
    for file in sorted(before.glob("*.safetensors")):
        old, new = load_file(file), load_file(after / file.name)
        assert old.keys() == new.keys()
        for name, tensor in old.items():
            assert tensor.dtype == new[name].dtype and tensor.shape == new[name].shape
            if not torch.equal(tensor, new[name]):
                found.add(name)
    return found


def test_writing_back_the_loaded_layer_changes_no_byte(adopted: Path, tmp_path: Path) -> None:
    fuse(adopted / "model", adopted / "head", tmp_path / "out", native=True, link=True)
    assert shards(tmp_path / "out") == shards(adopted / "model")


def test_a_checkpoint_in_one_file(tmp_path: Path) -> None:
    write("llama", tmp_path / "model")
    tensors: dict[str, Tensor] = {}
    for file in sorted((tmp_path / "model").glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    adopt(tmp_path / "model", tmp_path / "head")
    fuse(tmp_path / "model", tmp_path / "head", tmp_path / "out", native=True)
    assert shards(tmp_path / "out") == shards(tmp_path / "model")


def test_a_changed_head_changes_its_tensors_only(adopted: Path, tmp_path: Path) -> None:
    """Not the files of the target, hard-linked ones included, and no other bytes."""
    before = shards(adopted / "model")
    target = load_target(adopted / "model")
    head = load_head_for_training(adopted / "head", target)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(1.25)
    meta = read_head_file(adopted / "head").meta
    save_head(head, tmp_path / "better", meta)
    fuse(adopted / "model", tmp_path / "better", tmp_path / "out", native=True, link=True)
    assert shards(adopted / "model") == before
    changed = differing(adopted / "model", tmp_path / "out")
    family = FAMILIES[read_family(adopted)]
    buffers = ("e_score", "indexer")
    weights = {
        family.prefix + name for name in family.tensors if not any(one in name for one in buffers)
    }
    assert changed == weights
    name, file = sorted(weights)[0], "model-00002-of-00002.safetensors"
    old, new = (load_file(folder / file) for folder in (adopted / "model", tmp_path / "out"))
    assert torch.equal(new[name], (old[name].float() * 1.25).bfloat16())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"(`{family.prefix}*`) is OVERWRITTEN with this head" in card
    for other in ("config.json", "model.safetensors.index.json"):
        assert (tmp_path / "out" / other).read_bytes() == (adopted / "model" / other).read_bytes()
    # The written layer is the head: adopting it again gives the same weights.
    adopt(tmp_path / "out", tmp_path / "again")
    first, second = (load_file(tmp_path / one / "model.safetensors") for one in ("better", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def read_family(folder: Path) -> str:
    kind = json.loads((folder / "model" / "config.json").read_text())["model_type"]
    assert kind in FAMILIES
    return kind


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a checkpoint's second file, and its index with them."""
    file = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    others = {one: at for one, at in index["weight_map"].items() if at != file.name}
    index["weight_map"] = others | dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MISTAKES = {
    "carries no multi-token": lambda t: [t.pop(one) for one in list(t) if one.startswith(GLM)],
    "several multi-token": lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(32)}),
    "missing .*hnorm": lambda t: t.pop(GLM + "hnorm.weight"),
    "unknown .*gate_bias": lambda t: t.update({GLM + "mlp.gate_bias": torch.ones(2)}),
    "but the head expects": lambda t: t.update({GLM + "enorm.weight": torch.ones(31)}),
    "differs from the target's own": lambda t: t[GLM + "embed_tokens.weight"].mul_(2),
    "in an unknown layout": lambda t: [
        t.update({"mtp.proj.weight": torch.ones(2)}),
        *[t.pop(one) for one in list(t) if one.startswith(GLM)],
    ],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_unsupported_layers_are_an_error(message: str, tmp_path: Path) -> None:
    write("glm4_moe", tmp_path / "model")
    rewrite(tmp_path / "model", MISTAKES[message])
    with pytest.raises(ValueError, match=message):
        adopt(tmp_path / "model", tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_several_layers_of_qwen_are_an_error(tmp_path: Path) -> None:
    write("qwen3_next", tmp_path / "model")
    one = {"mtp.layers.1.input_layernorm.weight": torch.ones(32)}
    rewrite(tmp_path / "model", lambda tensors: tensors.update(one))
    with pytest.raises(ValueError, match=r"several multi-token .*mtp\.layers\.1\."):
        adopt(tmp_path / "model", tmp_path / "head")


def test_a_layer_of_another_kind_is_an_error(tmp_path: Path) -> None:
    """The names are those of a Llama layer, but this family rotates only half of head_dim, and has
    no dense layer."""
    write("glm4_moe", tmp_path / "model", first_k_dense_replace=0)
    dense = {"mlp.gate_proj.weight": (64, 32), "mlp.up_proj.weight": (64, 32)}
    dense |= {"mlp.down_proj.weight": (32, 64)}

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [one for one in tensors if one.startswith(GLM + "mlp.")]:
            tensors.pop(name)
        tensors.update({GLM + name: torch.ones(shape) for name, shape in dense.items()})

    rewrite(tmp_path / "model", change)
    with pytest.raises(ValueError, match=r"missing \['mlp.experts.0"):
        adopt(tmp_path / "model", tmp_path / "head")


def test_a_head_that_engines_compute_differently_is_not_written(tmp_path: Path) -> None:
    write("mimo", tmp_path / "model")
    target = load_target(tmp_path / "model")
    meta = HeadMeta(target="tiny")
    for kind, message in (("mtp", "before its final norm"), ("eagle3", "this one is eagle3")):
        save_head(make_head(target, kind, {}), tmp_path / kind, meta)
        with pytest.raises(ValueError, match=message):
            fuse(tmp_path / "model", tmp_path / kind, tmp_path / "out", native=True)
    adopt(tmp_path / "model", tmp_path / "head")
    with pytest.raises(ValueError, match="after the target's final norm"):
        fuse(tmp_path / "model", tmp_path / "head", tmp_path / "out", index=True)
    write("llama", tmp_path / "glm")
    adopt(tmp_path / "glm", tmp_path / "plain")
    with pytest.raises(ValueError, match="--native instead of --index"):
        fuse(tmp_path / "glm", tmp_path / "plain", tmp_path / "out", index=True)
    assert not (tmp_path / "out").exists()


def test_a_family_with_scaled_attention_is_adopted(tmp_path: Path) -> None:
    """Long-context DeepSeek-V3 scales its scores (YaRN), so the head's layer must do so too."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 1.0}
    rope |= {"mscale_all_dim": 1.0, "original_max_position_embeddings": 64}
    write("deepseek_v3", tmp_path / "model", rope_parameters=rope)
    head = adopt(tmp_path / "model", tmp_path / "head")
    assert head.layer.block.self_attn.scaling > 1.2 * 16**-0.5


@pytest.mark.parametrize(
    ("name", "layers"),
    [pytest.param("glm4_moe", 46, marks=pytest.mark.slow), ("glm4_moe", 2), ("deepseek_v3", 2)],
)
def test_transformers_drafts_with_the_written_layer(name: str, layers: int, tmp_path: Path) -> None:
    """transformers ignores the MTP layer for GLM-4.5-Air's number of layers only, so the test sets
    the pattern for two."""
    write(name, tmp_path / "model", num_hidden_layers=layers)
    head = adopt(tmp_path / "model", tmp_path / "head")
    with torch.no_grad():
        head.eh_proj.weight.mul_(1.25)
        head.layer.block.mlp.experts.down_proj.mul_(0.5)
    save_head(head, tmp_path / "better", HeadMeta(target="tiny"))
    fuse(tmp_path / "model", tmp_path / "better", tmp_path / "out", native=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if layers == 2:
        model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\..*"]
    prompt = prompts([9])[0][None]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **settings)
    assert torch.equal(model.generate(prompt, use_mtp=True, **settings), expected)
    head = load_head_for_training(tmp_path / "better", wrap_target(model))
    with torch.no_grad():
        output = head.target.forward(prompt)
        ours_BTD = head.unroll(output, prompt, 1)[0][:, :-1]
        theirs_BTD = first_step(model, prompt, output.lm_head_input_BTD)
    torch.testing.assert_close(ours_BTD, theirs_BTD, **NEAR)


def first_step(model: PreTrainedModel, tokens_BT: Tensor, lm_head_input_BTD: Tensor) -> Tensor:
    """The first draft step over a sequence in transformers, B x T-1 x D."""
    layer = MtpModel.from_pretrained(model)
    embedded_BTD = model.get_input_embeddings()(tokens_BT[:, 1:])
    pairs = embedded_BTD.shape[1]
    positions_BT = torch.arange(1, pairs + 1)[None]
    mask = torch.full((pairs, pairs), torch.finfo(torch.float32).min).triu(1)
    out: Tensor = layer.layers[0](
        embedded_BTD,
        lm_head_input_BTD[:, :-1],
        position_embeddings=layer.rotary_emb(embedded_BTD, positions_BT),
        attention_mask=mask[None, None],
        position_ids=positions_BT,
        **{cache_kwarg(layer.layers[0]): None},
    )
    return out


def test_the_commands(tmp_path: Path) -> None:
    write("mimo", tmp_path / "model")
    out = run("adopt", tmp_path / "model", tmp_path / "head").output
    assert "mtp head, " in out
    run("fuse", tmp_path / "model", tmp_path / "head", tmp_path / "out", "--native")
    assert shards(tmp_path / "out") == shards(tmp_path / "model")
    fresh = build("llama", {})
    fresh.save_pretrained(tmp_path / "bare")
    assert "carries no multi-token" in refused("adopt", tmp_path / "bare", tmp_path / "again")
    both = ("fuse", tmp_path / "model", tmp_path / "head", tmp_path / "two")
    assert "Choose one of the two" in refused(*both, "--native", "--index")


def test_the_cost_estimate_of_further_training_with_experts(tmp_path: Path) -> None:
    """Sizes follow from shapes alone, with a layer of the family too."""
    write("glm4_moe", tmp_path / "model")
    adopt(tmp_path / "model", tmp_path / "head")
    values = {
        "target": {"name": str(tmp_path / "model"), "dtype": "bfloat16"},
        "head": {"kind": "mtp"},
        "data": {"path": "responses.jsonl"},
        "train": {"output": "run", "start_from": str(tmp_path / "head"), "precision": "bfloat16"},
        "parallel": {"engine": "ddp"},
    }
    recipe = make_recipe(values)
    target, head = shapes(recipe)
    parts = memory(recipe, target, head, processes=1)
    count = sum(one.numel() for one in head.parameters())
    assert parts["head: weights"] == 4 * count and parts["head: kept for the backward pass"] > 0
    with_all = flops_per_token(recipe, target, head)
    chosen = head.config.family.settings | {"num_experts_per_tok": 4}
    family = head.config.family.model_copy(update={"settings": chosen})
    head.config = head.config.model_copy(update={"family": family})
    # Two more experts of three 32 x 32 matrices, in three steps; the backward pass costs twice.
    assert flops_per_token(recipe, target, head) - with_all == 2 * 3 * 3 * 2 * 3 * 32 * 32
