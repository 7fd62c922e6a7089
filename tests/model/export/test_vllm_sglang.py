"""`headstart export`: how vLLM and SGLang load the folders that it writes.

The engines need GPUs. Two readers of their formats stand for them, written independently of the
export. The logits of the first and second draft step are compared with the head's own.

Legend: V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sglang_reader
import torch
import vllm_reader
from export_cases import CASES, VD, V, fused, random_head, write_plain
from processes import HELPERS
from reference_draft import DraftLogits
from safetensors.torch import load_file, save_file

from headstart.model.checkpoint.head import load_head
from headstart.model.export.vllm_sglang import export
from headstart.model.heads.common.base import DraftHead
from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

TOKENS = [5, 90, 17, 33, 2, 64, 11, 48, 71, 9]
ANCHOR = 6  # position where drafting begins; one accepted and one draft token follow
NEAR = {"rtol": 1e-4, "atol": 1e-4}
READERS = [
    ("vllm", "native", vllm_reader.read),
    ("sglang", "native", sglang_reader.read),
    ("vllm", "speculators", vllm_reader.read),
]
NAMES = [f"{engine}-{form}" for engine, form, _ in READERS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plain(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def target(plain: Path) -> Target:
    return load_target(plain, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module", params=list(CASES))
def case(
    request: pytest.FixtureRequest,
    plain: Path,
    target: Target,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[DraftHead, Path]:
    head = random_head(target, **CASES[request.param])
    return head, fused(plain, head, tmp_path_factory.mktemp("case"))


def ours(head: DraftHead) -> list[DraftLogits]:
    """The head's own logits of the first and second draft step behind ANCHOR."""
    target, ids_BT = head.target, torch.tensor([TOKENS])
    with torch.no_grad():
        output = target.forward(ids_BT, taps=head.taps)
        hidden = head.unroll(output, ids_BT, 2)
        ids = torch.arange(V) if head.draft_ids is None else head.draft_ids
        return [DraftLogits(head.logits(step[0, ANCHOR]), ids) for step in hidden]


def theirs(folder: Path, read: Callable[..., Any], target: Target, **how: Any) -> list[DraftLogits]:
    draft = read(folder, target.model, **how)
    return [draft.begin(TOKENS[: ANCHOR + 1], TOKENS[ANCHOR + 1]), draft.follow(TOKENS[ANCHOR + 2])]


def agree(one: list[DraftLogits], other: list[DraftLogits]) -> list[bool]:
    return [
        torch.equal(a.ids, b.ids) and torch.allclose(a.logits, b.logits, **NEAR)
        for a, b in zip(one, other, strict=True)
    ]


@pytest.mark.parametrize(("engine", "form", "read"), READERS, ids=NAMES)
@pytest.mark.parametrize("rope", ["flat", "nested"])
def test_engines_compute_what_the_head_does(case, target, tmp_path, engine, form, read, rope):
    head, folder = case
    export(folder, tmp_path / "out", engine, form)
    found = theirs(tmp_path / "out", read, target, rope=rope)
    for mine, one in zip(ours(head), found, strict=True):
        torch.testing.assert_close(one.logits, mine.logits, **NEAR)
        assert torch.equal(one.ids, mine.ids)
    assert not torch.allclose(*(one.logits for one in found), **NEAR)


@pytest.mark.parametrize(("engine", "form", "read"), READERS, ids=NAMES)
def test_engines_draft_the_tokens_of_the_head(case, target, tmp_path, engine, form, read):
    head, folder = case
    export(folder, tmp_path / "out", engine, form)
    output = target.forward(torch.tensor([TOKENS[:-1]]), taps=head.taps)
    state = head.advance(
        head.start(1), output, torch.tensor([TOKENS[1:]]), torch.tensor([len(TOKENS) - 1])
    )
    tree = head.draft(state, TreeShape.chain(3))
    draft = read(tmp_path / "out", target.model)
    drafted = [draft.begin(TOKENS[:-1], TOKENS[-1]).token]
    for _ in range(2):
        drafted.append(draft.follow(drafted[-1]).token)
    assert tree.tokens_BN[0].tolist() == [TOKENS[-1], *drafted]


def test_both_engines_share_one_native_folder(case, plain, target, tmp_path):
    _, folder = case
    export(folder, tmp_path / "vllm", "vllm")
    export(folder, tmp_path / "sglang", "sglang")
    for name in ("config.json", "model.safetensors"):
        content = (tmp_path / "vllm" / name).read_bytes()
        assert content == (tmp_path / "sglang" / name).read_bytes()
        assert content == (folder / "draft_heads" / name).read_bytes()
    load_head(tmp_path / "vllm", target)  # Headstart loads it too


LAYER = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "vocab_size": V,
    "max_position_embeddings": 2048, "rope_theta": 700.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "tie_word_embeddings": False, "num_aux_hidden_states": 3,
}  # fmt: skip
DRAFT = {
    "norm_before_residual": False, "norm_before_fc": False, "torch_dtype": "bfloat16",
    "eagle_aux_hidden_state_layer_ids": [2, 3, 5],
}  # fmt: skip


def test_every_key_of_a_native_folder(case, tmp_path):
    head, folder = case
    export(folder, tmp_path / "out", "sglang")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("headstart")["head"]["kind"] == "eagle3"
    options = {name: getattr(head.config, name) for name in ("fc_norm", "norm_output")}
    assert config == {
        **LAYER, **DRAFT, **options,
        "architectures": ["LlamaForCausalLMEagle3"],
        "bias": False,
        "target_hidden_size": 48,
        "draft_vocab_size": head.config.draft_vocab,
        "eagle_config": {
            "use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
        },
    }  # fmt: skip


def test_every_key_and_name_of_a_folder_for_speculators(case, plain, tmp_path):
    head, folder = case
    (folder / "tokenizer.json").write_text("{}")
    line = export(folder, tmp_path / "out", "vllm", "speculators")
    assert line == f"vllm serve {tmp_path / 'out'}"
    assert (tmp_path / "out" / "tokenizer.json").is_file()  # vLLM looks for it in this folder
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("headstart")["target_hash"]
    options = {name: getattr(head.config, name) for name in ("fc_norm", "norm_output")}
    assert config == {
        **DRAFT, **options,
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.9.0",
        "draft_vocab_size": head.config.draft_vocab or V,
        "target_hidden_size": None,
        "embed_requires_grad": False,
        "transformer_layer_config": LAYER,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
            "verifier": {"name_or_path": str(folder), "architectures": ["LlamaForCausalLM"]},
        },
    }  # fmt: skip
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    expected = {f"layers.0.{name}.weight" for name in (*vllm_reader.LINEARS, *vllm_reader.NORMS)}
    expected |= {"fc.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight"}
    expected |= {f"fc_norm.{tap}.weight" for tap in range(3) if options["fc_norm"]}
    assert names == expected | ({"d2t", "t2d"} if head.config.draft_vocab else set())


def changed(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def layer_of(config: dict[str, Any]) -> dict[str, Any]:
    return config.get("transformer_layer_config", config)


def other_layers(config: dict[str, Any], tensors: dict[str, Any], by: int) -> None:
    if "eagle_config" in config:
        inner = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        inner[:] = [layer + by for layer in inner]
    outer = config["eagle_aux_hidden_state_layer_ids"]
    outer[:] = [layer + by for layer in outer]


def other_theta(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    layer_of(config)["rope_theta"] = 10000.0
    layer_of(config)["rope_parameters"]["rope_theta"] = 10000.0


def swapped_norms(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    prefix = "layers.0." if "layers.0.hidden_norm.weight" in tensors else "midlayer."
    one, other = (prefix + name for name in ("input_layernorm.weight", "hidden_norm.weight"))
    tensors[one], tensors[other] = tensors[other], tensors[one]


def other_final_norm(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    prefix = "layers.0." if "layers.0.hidden_norm.weight" in tensors else "midlayer."
    name = prefix + "post_attention_layernorm.weight"
    tensors["norm.weight"], tensors[name] = tensors[name], tensors["norm.weight"]


def taps_in_another_order(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["fc.weight"] = torch.cat(tensors["fc.weight"].chunk(3, 1)[::-1], 1).contiguous()


def other_eps(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    layer_of(config)["rms_norm_eps"] = 1e-2


def other_feedback(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["norm_output"] = not config["norm_output"]


def absolute_ids(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["d2t"] = tensors["d2t"] + torch.arange(VD)


MUTATIONS = [
    partial(other_layers, by=-1), other_theta, swapped_norms, other_final_norm, other_eps,
    taps_in_another_order, other_feedback, absolute_ids,
]  # fmt: skip


@pytest.fixture(scope="module")
def pruned(plain: Path, target: Target, tmp_path_factory) -> tuple[DraftHead, Path]:
    head = random_head(target, **CASES["pruned"])
    return head, fused(plain, head, tmp_path_factory.mktemp("pruned"))


@pytest.mark.parametrize(("engine", "form", "read"), READERS, ids=NAMES)
@pytest.mark.parametrize("change", MUTATIONS, ids=lambda one: getattr(one, "__name__", "layers"))
def test_a_wrong_folder_gives_other_logits(pruned, target, tmp_path, engine, form, read, change):
    head, folder = pruned
    export(folder, tmp_path / "out", engine, form)
    changed(tmp_path / "out", change)
    # The feedback shows in the second step only.
    expected = [change is other_feedback, False]
    assert agree(ours(head), theirs(tmp_path / "out", read, target)) == expected


def test_each_engine_takes_the_layers_from_its_own_key(pruned, target, tmp_path):
    head, folder = pruned
    export(folder, tmp_path / "out", "vllm")
    mine = ours(head)

    def other_outputs(config: dict[str, Any], _: object) -> None:
        config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [0, 1, 3]

    changed(tmp_path / "out", other_outputs)
    assert agree(mine, theirs(tmp_path / "out", vllm_reader.read, target)) == [True, True]
    assert agree(mine, theirs(tmp_path / "out", sglang_reader.read, target)) == [False, False]


def test_norm_before_residual_must_be_written(pruned, target, tmp_path):
    head, folder = pruned
    export(folder, tmp_path / "out", "vllm", "speculators")
    changed(tmp_path / "out", lambda config, _: config.pop("norm_before_residual"))
    assert agree(ours(head), theirs(tmp_path / "out", vllm_reader.read, target)) == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_speculators_itself_computes_what_the_head_does(plain, target, tmp_path, name):
    python = os.environ.get("SPECULATORS_PYTHON") or sys.executable
    if python == sys.executable and not find_spec("speculators"):
        pytest.skip(
            "speculators is not installed; SPECULATORS_PYTHON may name a Python that has it"
        )
    head = random_head(target, **CASES[name])
    folder = fused(plain, head, tmp_path)
    export(folder, tmp_path / "out", "vllm", "speculators")
    ids_BT = torch.tensor([TOKENS])
    output = target.forward(ids_BT, taps=head.taps)
    features = torch.cat([output.hidden_states[tap] for tap in head.taps], -1)[:, :-1].contiguous()
    case = tmp_path / "case"
    save_file({"features": features, "tokens": ids_BT[:, 1:].contiguous()}, case)
    command = [python, HELPERS / "speculators_reader.py", tmp_path / "out", case]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert done.returncode == 0, done.stderr[-4000:]
    read = load_file(tmp_path / "case.read")
    with torch.no_grad():
        hidden = head.unroll(output, ids_BT, 2)
    for step, one in enumerate(hidden):
        count = len(TOKENS) - 2 - step  # later positions need tokens beyond the sequence
        mine = head.logits(one[0, :count])
        torch.testing.assert_close(read["logits"][step][:count], mine.detach(), **NEAR)
    ids = torch.arange(V) if head.draft_ids is None else head.draft_ids
    assert torch.equal(read["ids"], ids)
