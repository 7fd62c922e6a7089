"""The configuration keys and tensor names in a head's folder that engines read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from saved_heads import DRAFT_VOCAB, META, VOCAB, random_head

from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.model_card import model_card
from headstart.model.target.target import Target


def test_an_eagle3_folder_has_the_keys_of_every_engine(
    sharded_target: Path, target: Target, tmp_path: Path
) -> None:
    """Each engine has its own key: vLLM and llama.cpp count layer inputs, SGLang layer outputs."""
    head = random_head(target, "eagle3")
    save_head(head, tmp_path / "head", META)
    fuse(sharded_target, tmp_path / "head", tmp_path / "fused")
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


def test_an_unsupported_layout_has_no_engine_keys(target: Target, tmp_path: Path) -> None:
    head = random_head(target, "eagle3", attention_layout="kvshare")
    save_head(head, tmp_path / "head", META, with_lm_head=True)
    assert json.loads((tmp_path / "head" / "config.json").read_text()).keys() == {"headstart"}
    assert "layout" in model_card(head, META, tmp_path)


def test_mtp_has_the_tensor_names_of_glm(target: Target, tmp_path: Path) -> None:
    save_head(random_head(target, "mtp"), tmp_path / "head", META)
    names = load_file(tmp_path / "head" / "model.safetensors").keys()
    prefix = f"model.layers.{target.num_layers}."
    assert {"enorm", "hnorm", "eh_proj", "shared_head.norm"} <= {
        name.removeprefix(prefix).removesuffix(".weight") for name in names
    }
    assert {name for name in names if not name.startswith(prefix)} == {"d2t"}
