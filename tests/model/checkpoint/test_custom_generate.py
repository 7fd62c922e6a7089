"""A fused checkpoint in plain transformers: its code drafts, and the output is the model's own.

The decoding runs in a process where Headstart cannot be imported (transformers_worker.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import HELPERS
from tiny_checkpoint import TinyCheckpoint
from tiny_run import VOCAB, follower, rule_target, tiny_target
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
)

from headstart.model.checkpoint.custom_generate import generate as standalone
from headstart.model.checkpoint.custom_generate.drafting import KINDS, HeadState, TargetOutput
from headstart.model.checkpoint.fuse import fuse
from headstart.model.checkpoint.fused import load_fused
from headstart.model.checkpoint.head import save_head
from headstart.model.checkpoint.metadata import HeadMeta
from headstart.model.heads.common.base import DraftHead, make_head
from headstart.model.target.load import load_target, wrap_target
from headstart.model.target.target import Target
from headstart.model.tree.shape import TreeShape

WORKER = HELPERS / "transformers_worker.py"
META = HeadMeta(target="someone/tiny", steps=3)
EOS = 2
Case = dict[str, Any]
Decode = Callable[[list[Case]], list[Case]]


def rule_head(target: Target, kind: str) -> DraftHead:
    """A head that knows the rule of `rule_target`, at every depth."""
    settings = {"taps": (0,), "norm_output": True} if kind == "eagle3" else {}
    head = make_head(target, kind, settings)
    one = torch.eye(VOCAB)
    next_VV = torch.zeros(VOCAB, VOCAB)
    next_VV[follower(), torch.arange(VOCAB)] = 1.0
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        if kind == "mtp":
            head.eh_proj.weight[:, :VOCAB] = one  # passes the newest token on
        elif kind == "eagle3":
            head.fc.weight.copy_(one)
            mlp = head.midlayer.mlp  # maps a token to the one that follows
            mlp.gate_proj.weight[:VOCAB] = mlp.up_proj.weight[:VOCAB] = one
            mlp.down_proj.weight[:, :VOCAB] = next_VV
        else:
            step_VV = next_VV
            for part in head.heads:
                part[0].linear.weight.copy_(10 * step_VV)
                step_VV = next_VV @ step_VV
    return head


def write_fused(
    target: Target, out: Path, make: Callable[[Target], DraftHead], **more: Any
) -> Path:
    """A fused checkpoint of a target and the head that `make` builds for it."""
    target.model.save_pretrained(out / "plain")
    target = load_target(out / "plain")
    save_head(make(target), out / "head", META)
    fuse(out / "plain", out / "head", out / "fused", **more)
    return out / "fused"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind: fused checkpoints of the target with a rule."""
    return {
        kind: write_fused(
            rule_target(), tmp_path_factory.mktemp(kind), partial(rule_head, kind=kind)
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def decode(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decode]:
    home = tmp_path_factory.mktemp("home")
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")},
    )
    assert process.stdin is not None and process.stdout is not None
    requests, replies = process.stdin, process.stdout

    def run(cases: list[Case]) -> list[Case]:
        requests.write(json.dumps(cases) + "\n")
        requests.flush()
        results: list[Case] = json.loads(replies.readline())
        return results

    yield run
    requests.close()
    assert process.wait(60) == 0


def case(folder: Path, ids: list[int], **options: Any) -> Case:
    return {"folder": str(folder), "ids": [ids], "options": options}


def test_every_kind_equals_the_model_in_fewer_passes(
    folders: dict[str, Path], decode: Decode
) -> None:
    cases = [
        case(folder, [3], max_new_tokens=count, eos_token_id=None)
        for folder in folders.values()
        for count in (1, 2, 3, 7, 24)  # most of them end inside an accepted chain
    ]
    cases[-1]["trusted"] = True
    results = decode(cases)
    for request, result in zip(cases, results, strict=True):
        count = request["options"]["max_new_tokens"]
        assert result["opening"] == []  # the root opens as the plain target
        assert result["own"]["ids"] == result["plain"]["ids"]
        assert len(result["own"]["ids"][0]) == 1 + count
        assert result["plain"]["passes"] == count
        # The prefill gives one token, each verify pass three draft tokens and the bonus token.
        assert result["own"]["passes"] == 1 + -(-(count - 1) // 4)
    assert results[-1]["trusted"] == results[-1]["own"]


def test_a_response_ends_inside_an_accepted_chain(folders: dict[str, Path], decode: Decode) -> None:
    """At each position of the chain, by the end-of-text token and by a criterion."""
    start = int(follower()[5])
    chain = [start]
    while len(chain) < 12:
        chain.append(int(follower()[chain[-1]]))
    cases = [
        case(folders["mtp"], [5], max_new_tokens=20, eos_token_id=end) for end in chain[:9]
    ] + [case(folders["eagle3"], [5], max_new_tokens=20, eos_token_id=[chain[6], chain[3]])]
    for request, result in zip(cases, decode(cases), strict=True):
        assert result["own"]["ids"] == result["plain"]["ids"]
        ends = request["options"]["eos_token_id"]
        assert result["own"]["ids"][0][-1] in (ends if isinstance(ends, list) else [ends])
        assert result["own"]["passes"] <= 1 + len(result["own"]["ids"][0]) // 4 + 1


def test_sampled_tokens_are_those_of_transformers(folders: dict[str, Path], decode: Decode) -> None:
    """One random draw per token, in the same order and from the same distribution: the same seed
    gives the same tokens, so the distribution is the model's."""
    options = {
        "max_new_tokens": 24,
        "do_sample": True,
        "temperature": 2.8,
        "top_p": 0.95,
        "top_k": 40,
        "repetition_penalty": 1.1,
        "eos_token_id": EOS,
    }
    cases = [
        case(folder, [3, 10, 17], **options) | {"seed": seed}
        for folder in folders.values()
        for seed in range(8)
    ]
    results = decode(cases)
    assert all(result["own"]["ids"] == result["plain"]["ids"] for result in results)
    sequences = {tuple(result["own"]["ids"][0]) for result in results}
    assert len(sequences) > 4  # they are sampled
    passes = {way: sum(result[way]["passes"] for result in results) for way in ("own", "plain")}
    assert passes["own"] < 0.8 * passes["plain"]


def test_processors_and_results_are_those_of_transformers(
    folders: dict[str, Path], decode: Decode
) -> None:
    """Processors that look at previous tokens must see all of them, in order."""
    kept = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    cases = [
        case(folders["mtp"], [3, 10, 17], max_new_tokens=60, no_repeat_ngram_size=2),
        case(folders["mtp"], [3, 10, 17], max_new_tokens=30, repetition_penalty=3.0),
        case(folders["eagle3"], [3, 10], max_new_tokens=9, min_new_tokens=8, eos_token_id=24),
        case(folders["medusa"], [3, 10], max_new_tokens=9, **kept),
    ]
    results = decode(cases)
    assert all(result["own"]["ids"] == result["plain"]["ids"] for result in results)
    own, plain = (torch.tensor(results[-1][way]["near"]) for way in ("own", "plain"))
    assert own.shape == (2, 9, 5)
    torch.testing.assert_close(own, plain)


LAYOUTS: list[tuple[str, dict[str, object]]] = [
    ("medusa", {"num_heads": 3, "num_layers": 2}),
    ("mtp", {"attention_layout": "append"}),
    ("mtp", {"attention_layout": "kvshare"}),
    ("mtp", {"attention_layout": "kvshare", "window": 3, "feature_layer": 1}),
    ("eagle3", {"fc_norm": True, "norm_output": True, "attention_layout": "kvshare"}),
    ("eagle3", {"window": 4, "taps": (0, 1)}),
]


def random_head(target: Target, kind: str, settings: dict[str, object]) -> DraftHead:
    torch.manual_seed(1)
    head = make_head(target, kind, {"draft_vocab": 31, **settings})
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    head.set_draft_vocab(torch.randperm(VOCAB)[:31])
    return head


@pytest.mark.parametrize(("kind", "settings"), LAYOUTS)
def test_draft_tokens_are_those_of_headstart(
    tmp_path: Path, kind: str, settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every layout, with windows, draft vocabularies and norms, over several decode steps."""
    monkeypatch.setattr(Target, "drafts_in_int8", False)  # int8 may draft other tokens
    folder = write_fused(tiny_target(), tmp_path, lambda one: random_head(one, kind, settings))
    target, theirs = load_fused(folder, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ours, draft_steps = standalone._head_of(model)
    assert draft_steps == META.steps and ours.taps == theirs.taps
    state, our_state = theirs.start(1), HeadState()
    tokens_1T = torch.randint(VOCAB, (1, 30))
    at = 0
    for new in (6, 1, 3, 2, 1, 4):
        output = target.forward(tokens_1T[:, : at + new], taps=ours.taps)
        index_1P = torch.arange(at, at + new)[None]
        part = output.gather(index_1P)
        next_1P = tokens_1T[:, at + 1 : at + new + 1]
        state = theirs.advance(state, part, next_1P, torch.tensor([new]))
        our_part = TargetOutput(
            torch.empty(1, new, 0), part.lm_head_input_BTD, dict(part.hidden_states)
        )
        ours.advance(our_state, our_part, next_1P)
        expected = theirs.draft(state, TreeShape.chain(3)).tokens_BN[:, 1:]
        with torch.no_grad():
            assert torch.equal(ours.draft(our_state, 3), expected)
        at += new


def test_windows_of_the_target_are_kept(tmp_path: Path, decode: Decode) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=VOCAB,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=5,
        initializer_range=0.2,
        eos_token_id=None,
    )
    target = wrap_target(MistralForCausalLM(config))
    folder = write_fused(target, tmp_path, lambda one: random_head(one, "mtp", {}))
    for result in decode([case(folder, [3, 1, 4, 1, 5, 9, 2, 6], max_new_tokens=40)]):
        assert result["own"]["ids"] == result["plain"]["ids"]
        assert len(result["own"]["ids"][0]) == 48


def test_a_random_model_is_decoded_exactly(tmp_path: Path, decode: Decode) -> None:
    """Draft tokens are nearly always wrong: every decode step crops the cache."""
    cases = []
    for kind in KINDS:
        make = lambda one, kind=kind: random_head(one, kind, {})  # noqa: E731
        folder = write_fused(tiny_target(), tmp_path / kind, make)
        cases += [
            case(folder, ids, max_new_tokens=30, eos_token_id=None, num_assistant_tokens=4)
            for ids in ([7], [3, 1, 4, 1, 5])
        ]
    for result in decode(cases):
        assert result["own"]["ids"] == result["plain"]["ids"]


def test_unsupported_requests_are_an_error(folders: dict[str, Path], decode: Decode) -> None:
    folder = folders["mtp"]
    short: Any = {"max_new_tokens": 4}
    cases = [
        case(folder, [3, 10], **short) | {"ids": [[3, 10], [4, 11]]},
        case(folder, [3, 10], num_return_sequences=2, do_sample=True, **short),
        case(folder, [3, 10], num_beams=2, **short),
        case(folder, [3, 10], num_assistant_tokens=0, **short),
        case(folder, [3, 10], stop_strings=["a"], **short),
        case(folder, [3, 10], output_attentions=True, return_dict_in_generate=True, **short),
        case(folder.parent / "plain", [3, 10], **short) | {"code": str(folder)},
    ]
    messages = [
        "one prompt at a time, and this is a batch of 2",
        "one prompt at a time, and this is a batch of 2",
        "greedily or samples; beam_search is not supported",
        "num_assistant_tokens must be at least 1",
        "stop_strings needs the tokenizer too",
        "does not return output_attentions and output_hidden_states",
        "Open it from the folder or repository of the fused checkpoint",
    ]
    for message, result in zip(messages, decode(cases), strict=True):
        assert message in result["own"]["refused"]


def test_streaming_and_stop_strings(tiny_checkpoint: TinyCheckpoint) -> None:
    folder = tiny_checkpoint.fused["mtp"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    more: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    whole = model.generate(ids, **more)
    last = tokenizer.decode(whole[0, -5:-3])
    more |= {"stop_strings": [last], "tokenizer": tokenizer}
    expected = model.generate(ids, **more)
    assert ids.shape[1] < expected.shape[1] < whole.shape[1]
    streamer = Streamer()
    assert torch.equal(standalone.generate(ids, model=model, streamer=streamer, **more), expected)
    assert streamer.tokens == expected[0].tolist() and streamer.ended
    config = GenerationConfig(stop_strings=[last])
    with pytest.raises(ValueError, match="as an argument of generate"):
        standalone.generate(ids, model=model, generation_config=config, tokenizer=tokenizer)


class Streamer:
    """A streamer that keeps its tokens."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_padding_and_given_caches_are_an_error(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["mtp"])
    ids = torch.tensor([[3, 10]])
    with pytest.raises(ValueError, match="hides tokens"):
        standalone.generate(ids, model=model, attention_mask=torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="does not take past_key_values"):
        standalone.generate(ids, model=model, past_key_values=DynamicCache())
    # Another decoding loop is passed on to transformers.
    loop = {"custom_generate": lambda model, input_ids, **_: input_ids + 1}
    assert torch.equal(standalone.generate(ids, model=model, **loop), ids + 1)
    model.config.rope_parameters = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 8,
    }
    with pytest.raises(ValueError, match="Beyond 8 tokens"):
        standalone.generate(ids, model=model, max_length=9)


def test_the_code_is_written_if_it_can_draft(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["mtp"]
    sources = Path(standalone.__file__).parent
    for name in ("generate.py", "drafting.py"):
        assert (folder / "custom_generate" / name).read_bytes() == (sources / name).read_bytes()
    card = (folder / "README.md").read_text()
    assert 'code = {"custom_generate": "FOLDER", "trust_remote_code": True}' in card
    # With the index transformers drafts by itself, and its `generate` must stay its own.
    fuse(folder, folder / "draft_heads", tmp_path / "indexed", index=True)
    assert not (tmp_path / "indexed" / "custom_generate").exists()
    target = load_target(folder)
    save_head(make_head(target, "mtp", {"zero_centred": True}), tmp_path / "head", META)
    fuse(folder, tmp_path / "head", tmp_path / "other")
    assert not (tmp_path / "other" / "custom_generate").exists()
    assert "custom_generate" not in (tmp_path / "indexed" / "README.md").read_text()
