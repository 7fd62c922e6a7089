"""The draft head of this folder in plain torch: drafts a chain of tokens (see generate.py).

Its tensors and arithmetic are those of Headstart, whose tests hold it to the same draft tokens.

Legend: 1 batch of one sequence, P new positions, S cache slots, K draft tokens, H query heads,
G key/value heads, C head_dim, D hidden size, V vocabulary, Vd draft vocabulary.
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
    """Output of one forward pass of the target over P positions.

    logits_1PV: logits.
    lm_head_input_1PD: input of the LM head.
    hidden_states: outputs of decoder layers, 1 x P x D each, by layer index.
    """

    logits_1PV: Tensor
    lm_head_input_1PD: Tensor
    hidden_states: dict[int, Tensor]

    def first(self, count: int) -> TargetOutput:
        """The first positions only."""
        hidden = {layer: one[:, :count] for layer, one in self.hidden_states.items()}
        return TargetOutput(self.logits_1PV[:, :count], self.lm_head_input_1PD[:, :count], hidden)


@dataclass
class HeadState:
    """Decoding state of the head for one sequence.

    output_11D: the head's output at the last position. Medusa: the target's last feature.
    keys, values: 1 x G x S x C, one slot for each pair of a feature and the next token.
    """

    output_11D: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor | None = None
    values: Tensor | None = None

    def appended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The cached keys and values followed by new ones."""
        if self.keys is None or self.values is None:
            return keys, values
        return torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)


class Head(nn.Module):
    """A draft head. It shares the target's embedding and LM head, which are not submodules."""

    taps: tuple[int, ...] = ()
    device: torch.device
    d2t: Tensor

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        if config["draft_vocab"] is not None:
            self.register_buffer("d2t", torch.zeros(config["draft_vocab"], dtype=torch.long))

    def bind(self, model: PreTrainedModel) -> Head:
        """Share the embedding and LM head of a model; move to its device and dtype."""
        linear = model.get_output_embeddings()
        self.ids, rows, bias = None, linear.weight, linear.bias
        if self.config["draft_vocab"] is not None:
            self.ids = self.d2t.to(rows.device) + torch.arange(len(self.d2t), device=rows.device)
            rows, bias = rows[self.ids], None if bias is None else bias[self.ids]
        self.shared = [(model.get_input_embeddings(), rows, bias)]  # a list: not submodules
        self.device = rows.device
        return self.to(device=rows.device, dtype=rows.dtype).eval().requires_grad_(False)

    def is_current(self, model: PreTrainedModel) -> bool:
        """Whether the model still has the device and dtype that it had in `bind`."""
        rows, weight = self.shared[0][1], model.get_output_embeddings().weight
        return bool(rows.device == weight.device and rows.dtype == weight.dtype)

    def embed(self, tokens_1P: Tensor) -> Tensor:
        embedding = self.shared[0][0]
        weight: Any = embedding.weight
        embedded_1PD: Tensor = embedding(tokens_1P.to(weight.device))
        return self.converted(embedded_1PD)

    def converted(self, states_1PD: Tensor) -> Tensor:
        """States of the target on the head's device and in its dtype."""
        return states_1PD.to(self.shared[0][1])

    def argmax_token(self, hidden_11D: Tensor) -> Tensor:
        """The most likely token, 1 x 1. Scaling or capping logits would not change it."""
        _, rows, bias = self.shared[0]
        index_11 = F.linear(hidden_11D, rows, bias).argmax(-1)
        return index_11 if self.ids is None else self.ids[index_11]

    def advance(self, state: HeadState, output: TargetOutput, next_1P: Tensor) -> None:
        """Append P verified positions to the state. next_1P: the token after each of them."""
        raise NotImplementedError

    def draft(self, state: HeadState, count: int) -> Tensor:
        """Draft at most `count` tokens: ids, 1 x K."""
        raise NotImplementedError


class Autoregressive(Head):
    """Drafts one token per step, with its own output as the feature of the next step."""

    norm: nn.Module

    def feature(self, output: TargetOutput) -> Tensor:
        """What the head reads of the target, 1 x P x D."""
        raise NotImplementedError

    def step(
        self, embedded_1PD: Tensor, feature_1PD: Tensor, positions_P: Tensor, attend: Attend
    ) -> Tensor:
        """One application of the decoder layer, 1 x P x D, before the final norm."""
        raise NotImplementedError

    def next_feature(self, output_11D: Tensor) -> Tensor:
        """The feature of the next draft step."""
        raise NotImplementedError

    def advance(self, state: HeadState, output: TargetOutput, next_1P: Tensor) -> None:
        before = 0 if state.keys is None else state.keys.shape[2]
        positions_P = torch.arange(before, before + next_1P.shape[1], device=self.device)
        slots_S = torch.arange(before + next_1P.shape[1], device=self.device)
        mask_PS = slots_S <= positions_P[:, None]
        if self.config["window"] is not None:
            mask_PS &= slots_S > positions_P[:, None] - self.config["window"]

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            state.keys, state.values = state.appended(keys, values)
            return _attention(queries, state.keys, state.values, mask_PS)

        hidden_1PD = self.step(self.embed(next_1P), self.feature(output), positions_P, attend)
        state.output_11D = hidden_1PD[:, -1:]

    def draft(self, state: HeadState, count: int) -> Tensor:
        assert state.keys is not None and state.values is not None
        last, window = state.keys.shape[2] - 1, self.config["window"]
        first = 0 if window is None else max(0, last - window + 1)
        drafted = HeadState(state.output_11D, state.keys[:, :, first:], state.values[:, :, first:])

        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            if self.config["attention_layout"] == "append":  # otherwise drafts leave no keys
                drafted.keys, drafted.values = drafted.appended(keys, values)
            assert drafted.keys is not None and drafted.values is not None
            return _attention(queries, drafted.keys, drafted.values, None)

        tokens: list[Tensor] = []
        for depth in range(count):
            if depth:
                position_1 = torch.tensor([last + depth], device=self.device)
                feature_11D = self.next_feature(drafted.output_11D)
                embedded_11D = self.embed(tokens[-1])
                drafted.output_11D = self.step(embedded_11D, feature_11D, position_1, attend)
            tokens.append(self.argmax_token(self.norm(drafted.output_11D)))
        empty_10 = torch.empty(1, 0, dtype=torch.long, device=self.device)
        return torch.cat([empty_10, *tokens], 1)


class Eagle3(Autoregressive):
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

    def feature(self, output: TargetOutput) -> Tensor:
        taps = [self.converted(output.hidden_states[layer]) for layer in self.taps]
        if self.config["fc_norm"]:
            taps = [norm(tap) for norm, tap in zip(self.fc_norm, taps, strict=True)]
        fused_1PD: Tensor = self.fc(torch.cat(taps, -1))
        return fused_1PD

    def step(
        self, embedded_1PD: Tensor, feature_1PD: Tensor, positions_P: Tensor, attend: Attend
    ) -> Tensor:
        layer = self.midlayer
        normed = [layer.input_layernorm(embedded_1PD), layer.hidden_norm(feature_1PD)]
        return layer(feature_1PD, torch.cat(normed, -1), positions_P, attend)

    def next_feature(self, output_11D: Tensor) -> Tensor:
        return self.norm(output_11D) if self.config["norm_output"] else output_11D


class Mtp(Autoregressive):
    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        size, eps = config["hidden_size"], config["layer"]["rms_norm_eps"]
        feature_layer = config["feature_layer"]
        self.taps = () if feature_layer is None else (feature_layer,)
        self.enorm, self.hnorm = nn.RMSNorm(size, eps), nn.RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.layer, self.norm = Layer(config["layer"], size), nn.RMSNorm(size, eps)

    def feature(self, output: TargetOutput) -> Tensor:
        tap = output.hidden_states[self.taps[0]] if self.taps else output.lm_head_input_1PD
        return self.converted(tap)

    def step(
        self, embedded_1PD: Tensor, feature_1PD: Tensor, positions_P: Tensor, attend: Attend
    ) -> Tensor:
        normed = [self.enorm(embedded_1PD), self.hnorm(feature_1PD)]
        hidden_1PD = self.eh_proj(torch.cat(normed, -1))
        return self.layer(hidden_1PD, self.layer.input_layernorm(hidden_1PD), positions_P, attend)

    def next_feature(self, output_11D: Tensor) -> Tensor:
        return self.norm(output_11D)


class Block(nn.Module):
    """A residual block of a Medusa head."""

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + F.silu(self.linear(hidden))


class Medusa(Head):
    """Drafts all tokens at once, each with a stack of blocks of its own."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        size, blocks = config["hidden_size"], range(config["num_layers"])
        self.heads = nn.ModuleList(
            nn.Sequential(*(Block(size) for _ in blocks)) for _ in range(config["num_heads"])
        )

    def advance(self, state: HeadState, output: TargetOutput, next_1P: Tensor) -> None:
        state.output_11D = self.converted(output.lm_head_input_1PD[:, -1:])

    def draft(self, state: HeadState, count: int) -> Tensor:
        tokens = [self.argmax_token(head(state.output_11D)) for head in self.heads[:count]]
        empty_10 = torch.empty(1, 0, dtype=torch.long, device=self.device)
        return torch.cat([empty_10, *tokens], 1)


class Layer(nn.Module):
    """A pre-norm Llama decoder layer, whose caller norms the input of the attention."""

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

    def forward(
        self, residual_1PD: Tensor, normed: Tensor, positions_P: Tensor, attend: Attend
    ) -> Tensor:
        hidden_1PD = residual_1PD + self.self_attn(normed, positions_P, attend)
        normed_1PD, mlp = self.post_attention_layernorm(hidden_1PD), self.mlp
        gated = F.silu(mlp["gate_proj"](normed_1PD)) * mlp["up_proj"](normed_1PD)
        output_1PD: Tensor = hidden_1PD + mlp["down_proj"](gated)
        return output_1PD


class Attention(nn.Module):
    def __init__(self, config: dict[str, Any], input_size: int):
        super().__init__()
        self.head_dim, self.theta = config["head_dim"], config["rope_theta"]
        query_size = config["num_attention_heads"] * self.head_dim
        kv_size = config["num_key_value_heads"] * self.head_dim
        bias = config["attention_bias"]
        self.q_proj = nn.Linear(input_size, query_size, bias=bias)
        self.k_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.v_proj = nn.Linear(input_size, kv_size, bias=bias)
        self.o_proj = nn.Linear(query_size, config["hidden_size"], bias=False)
        if config["qk_norm"]:
            self.q_norm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"])
            self.k_norm = nn.RMSNorm(self.head_dim, config["rms_norm_eps"])

    def forward(self, hidden_1PD: Tensor, positions_P: Tensor, attend: Attend) -> Tensor:
        split = (1, hidden_1PD.shape[1], -1, self.head_dim)
        queries, keys, values = (
            project(hidden_1PD).view(split) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = (
            _rotate(one.transpose(1, 2), positions_P, self.theta) for one in (queries, keys)
        )
        attended_1HPC = attend(queries, keys, values.transpose(1, 2))
        output_1PD: Tensor = self.o_proj(attended_1HPC.transpose(1, 2).flatten(2))
        return output_1PD


def _rotate(states_1HPC: Tensor, positions_P: Tensor, theta: float) -> Tensor:
    """Apply rotary position embedding, half-split as in Llama."""
    half = states_1HPC.shape[-1] // 2
    wide = torch.float64 if states_1HPC.dtype == torch.float64 else torch.float32
    steps = torch.arange(half, dtype=wide, device=positions_P.device) / half
    angles_PC = positions_P[:, None].to(wide) * theta**-steps
    cos, sin = angles_PC.cos().to(states_1HPC.dtype), angles_PC.sin().to(states_1HPC.dtype)
    left, right = states_1HPC[..., :half], states_1HPC[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)


KINDS: dict[str, type[Head]] = {"eagle3": Eagle3, "mtp": Mtp, "medusa": Medusa}
