"""The draft head of this folder, guessing chains in plain torch (see generate.py).

Its tensors and its arithmetic are Headstart's, of which a test holds it to the same guesses.

Legend: 1 the only row, P new positions, S pairs in the cache, K guesses, H query heads,
G key/value heads, C head channels, D hidden size, V vocabulary, Vd draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TargetOutput:
    """What the model made of P positions. last_1PD: the input of its LM head. hidden: outputs of
    its decoder layers, by their place."""

    logits_1PV: Tensor
    last_1PD: Tensor
    hidden_states: dict[int, Tensor]

    def first(self, count: int) -> TargetOutput:
        hidden = {layer: one[:, :count] for layer, one in self.hidden_states.items()}
        return TargetOutput(self.logits_1PV[:, :count], self.last_1PD[:, :count], hidden)


@dataclass
class HeadState:
    """Of the text so far: keys and values (1 G S C) of the pairs of a feature and the next token,
    and the head's output at the last one. Medusa keeps the last feature alone, as `output_11D`."""

    output_11D: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor | None = None
    values: Tensor | None = None

    def join(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


class Head(nn.Module):
    """A draft head. The model's embedding and LM head are borrowed, not owned."""

    taps: tuple[int, ...] = ()
    device: torch.device
    d2t: Tensor

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        if config["draft_vocab"] is not None:
            self.register_buffer("d2t", torch.zeros(config["draft_vocab"], dtype=torch.long))

    def borrow(self, model: PreTrainedModel) -> Head:
        linear = model.get_output_embeddings()
        self.ids, rows, bias = None, linear.weight, linear.bias
        if self.config["draft_vocab"] is not None:
            self.ids = self.d2t.to(rows.device) + torch.arange(len(self.d2t), device=rows.device)
            rows, bias = rows[self.ids], None if bias is None else bias[self.ids]
        self.words = [(model.get_input_embeddings(), rows, bias)]  # in a list: no parts of it
        self.device = rows.device
        return self.to(device=rows.device, dtype=rows.dtype).eval().requires_grad_(False)

    def suits(self, model: PreTrainedModel) -> bool:
        """Whether what was borrowed is where and as the model is now."""
        rows, weight = self.words[0][1], model.get_output_embeddings().weight
        return bool(rows.device == weight.device and rows.dtype == weight.dtype)

    def embed(self, tokens_1P: Tensor) -> Tensor:
        embedding = self.words[0][0]
        weight: Any = embedding.weight
        embedded_1PD: Tensor = embedding(tokens_1P.to(weight.device))
        return self.take(embedded_1PD)

    def take(self, states_1PD: Tensor) -> Tensor:
        """What the model says, where and as the head computes."""
        return states_1PD.to(self.words[0][1])

    def best(self, hidden_11D: Tensor) -> Tensor:
        """The likeliest token, 1 x 1. Scaled or capped logits have it at the same place."""
        _, rows, bias = self.words[0]
        index_11 = F.linear(hidden_11D, rows, bias).argmax(-1)
        return index_11 if self.ids is None else self.ids[index_11]

    def advance(self, pairs: HeadState, seen: TargetOutput, next_1P: Tensor) -> None:
        """Take in P positions of the text and the tokens that follow them."""
        raise NotImplementedError

    def draft(self, pairs: HeadState, count: int) -> Tensor:
        """1 x K token ids that may follow; at most `count`."""
        raise NotImplementedError


class Recurrent(Head):
    """Drafts one token at a time, with its own output for the next feature."""

    norm: nn.Module

    def feature(self, seen: TargetOutput) -> Tensor:
        raise NotImplementedError

    def step(self, embedded: Tensor, feature: Tensor, at_P: Tensor, attend: Attend) -> Tensor:
        raise NotImplementedError

    def next_feature(self, output_11D: Tensor) -> Tensor:
        raise NotImplementedError

    def advance(self, pairs: HeadState, seen: TargetOutput, next_1P: Tensor) -> None:
        before = 0 if pairs.keys is None else pairs.keys.shape[2]
        at_P = torch.arange(before, before + next_1P.shape[1], device=self.device)
        from_S = torch.arange(before + next_1P.shape[1], device=self.device)
        mask_PS = from_S <= at_P[:, None]
        if self.config["window"] is not None:
            mask_PS &= from_S > at_P[:, None] - self.config["window"]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            pairs.keys, pairs.values = pairs.join(keys, values)
            return _attention(queries, pairs.keys, pairs.values, mask_PS)

        output_1PD = self.step(self.embed(next_1P), self.feature(seen), at_P, attend)
        pairs.output_11D = output_1PD[:, -1:]

    def draft(self, pairs: HeadState, count: int) -> Tensor:
        assert pairs.keys is not None and pairs.values is not None
        last, window = pairs.keys.shape[2] - 1, self.config["window"]
        first = 0 if window is None else max(0, last - window + 1)
        drafted = HeadState(pairs.output_11D, pairs.keys[:, :, first:], pairs.values[:, :, first:])

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self.config["attention_layout"] == "append":  # else a guess leaves no keys
                drafted.keys, drafted.values = drafted.join(keys, values)
            assert drafted.keys is not None and drafted.values is not None
            return _attention(queries, drafted.keys, drafted.values, None)

        tokens: list[Tensor] = []
        for depth in range(count):
            if depth:
                at_1 = torch.tensor([last + depth], device=self.device)
                feature_11D = self.next_feature(drafted.output_11D)
                embedded_11D = self.embed(tokens[-1])
                drafted.output_11D = self.step(embedded_11D, feature_11D, at_1, attend)
            tokens.append(self.best(self.norm(drafted.output_11D)))
        empty_10 = torch.empty(1, 0, dtype=torch.long, device=self.device)
        return torch.cat([empty_10, *tokens], 1)


class Eagle3(Recurrent):
    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        layer, self.taps = config["layer"], tuple(config["taps"])
        size, eps = config["hidden_size"], layer["rms_norm_eps"]
        self.fc = nn.Linear(len(self.taps) * size, size, bias=False)
        taps = self.taps if config["fc_norm"] else ()
        self.fc_norm = nn.ModuleList(nn.RMSNorm(size, eps) for _ in taps)
        self.midlayer = Layer(layer, 2 * size)
        self.midlayer.hidden_norm = nn.RMSNorm(size, eps)
        self.norm = nn.RMSNorm(size, eps)

    def feature(self, seen: TargetOutput) -> Tensor:
        taps = [self.take(seen.hidden_states[layer]) for layer in self.taps]
        if self.config["fc_norm"]:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        fused_1PD: Tensor = self.fc(torch.cat(taps, -1))
        return fused_1PD

    def cell(self, embedded: Tensor, feature: Tensor, at_P: Tensor, attend: Attend) -> Tensor:
        layer = self.midlayer
        joined = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(feature)], -1)
        return layer.after(feature, joined, at_P, attend)

    def next_feature(self, output_11D: Tensor) -> Tensor:
        return self.norm(output_11D) if self.config["norm_output"] else output_11D


class Mtp(Recurrent):
    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        size, eps = config["hidden_size"], config["layer"]["rms_norm_eps"]
        place = config["feature_layer"]
        self.taps = () if place is None else (place,)
        self.enorm, self.hnorm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer, self.norm = Layer(config["layer"], size), nn.RMSNorm(size, eps)

    def feature(self, seen: TargetOutput) -> Tensor:
        return self.take(seen.hidden_states[self.taps[0]] if self.taps else seen.last_1PD)

    def cell(self, embedded: Tensor, feature: Tensor, at_P: Tensor, attend: Attend) -> Tensor:
        hidden = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(feature)], -1))
        return self.layer.after(hidden, self.layer.input_layernorm(hidden), at_P, attend)

    def next_feature(self, output_11D: Tensor) -> Tensor:
        return self.norm(output_11D)


class Block(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class Medusa(Head):
    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        size, blocks = config["hidden_size"], range(config["num_layers"])
        self.heads = nn.ModuleList(
            nn.Sequential(*(Block(size) for _ in blocks)) for _ in range(config["num_heads"])
        )

    def advance(self, pairs: HeadState, seen: TargetOutput, next_1P: Tensor) -> None:
        pairs.output_11D = self.take(seen.last_1PD[:, -1:])

    def draft(self, pairs: HeadState, count: int) -> Tensor:
        tokens = [self.best(head(pairs.output_11D)) for head in self.heads[:count]]
        empty_10 = torch.empty(1, 0, dtype=torch.long, device=self.device)
        return torch.cat([empty_10, *tokens], 1)


class Layer(nn.Module):
    """A pre-norm Llama layer."""

    hidden_norm: nn.Module

    def __init__(self, config: dict[str, Any], input_size: int):
        super().__init__()
        size, wide, eps = config["hidden_size"], config["intermediate_size"], config["rms_norm_eps"]
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = Attention(config, input_size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(size, wide, bias=False),
                "up_proj": nn.Linear(size, wide, bias=False),
                "down_proj": nn.Linear(wide, size, bias=False),
            }
        )

    def after(self, hidden: Tensor, normed: Tensor, at_P: Tensor, attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(normed, at_P, attend)
        normed, mlp = self.post_attention_layernorm(hidden), self.mlp
        gated = F.silu(mlp["gate_proj"](normed)) * mlp["up_proj"](normed)
        return hidden + mlp["down_proj"](gated)


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any], input_size: int):
        super().__init__()
        self.channels, self.theta = config["head_dim"], config["rope_theta"]
        heads = config["num_attention_heads"] * self.channels
        groups = config["num_key_value_heads"] * self.channels
        bias = config["attention_bias"]
        self.q_proj = nn.Linear(input_size, heads, bias=bias)
        self.k_proj = nn.Linear(input_size, groups, bias=bias)
        self.v_proj = nn.Linear(input_size, groups, bias=bias)
        self.o_proj = nn.Linear(heads, config["hidden_size"], bias=False)
        if config["qk_norm"]:
            self.q_norm = nn.RMSNorm(self.channels, config["rms_norm_eps"])
            self.k_norm = nn.RMSNorm(self.channels, config["rms_norm_eps"])

    def forward(self, hidden_1PD: Tensor, at_P: Tensor, attend: Attend) -> Tensor:
        split = (1, hidden_1PD.shape[1], -1, self.channels)
        queries, keys, values = (
            project(hidden_1PD).view(split) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = (_rotate(one.transpose(1, 2), at_P, self.theta) for one in (queries, keys))
        attended_1HPC = attend(queries, keys, values.transpose(1, 2))
        output_1PD: Tensor = self.o_proj(attended_1HPC.transpose(1, 2).flatten(2))
        return output_1PD


def _rotate(states_1HPC: Tensor, at_P: Tensor, theta: float) -> Tensor:
    """Rotary positions, half-split as in Llama."""
    half = states_1HPC.shape[-1] // 2
    wide = torch.float64 if states_1HPC.dtype == torch.float64 else torch.float32
    steps = torch.arange(half, dtype=wide, device=at_P.device) / half
    angles_PC = at_P[:, None].to(wide) * theta**-steps
    cos, sin = angles_PC.cos().to(states_1HPC.dtype), angles_PC.sin().to(states_1HPC.dtype)
    left, right = states_1HPC[..., :half], states_1HPC[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)


KINDS: dict[str, type[Head]] = {"eagle3": Eagle3, "mtp": Mtp, "medusa": Medusa}
