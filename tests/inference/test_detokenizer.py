"""Text that comes in pieces: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import random

import pytest
from chat_model import tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headstart.inference.detokenizer import CONTEXT, TextStream
from headstart.model.target.load import wrap_target
from headstart.model.target.target import Target

# Characters of one to four bytes, each of which is a token.
TEXT = "na\u00efve \u20ac5 \u65e5\u672c \U0001f600! " * 8


@pytest.fixture(scope="module")
def target() -> Target:
    made = tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(made), num_attention_heads=2, **sizes)
    return wrap_target(LlamaForCausalLM(config), made)


def steps(tokens: list[int], seed: int, most: int = 5) -> list[list[int]]:
    chance = random.Random(seed)
    cut: list[list[int]] = []
    while tokens:
        size = chance.randint(1, most)
        cut.append(tokens[:size])
        tokens = tokens[size:]
    return cut


def told(stream: TextStream, tokens: list[int], seed: int) -> list[str]:
    return [*(stream.add(step) for step in steps(tokens, seed)), stream.end()]


def test_pieces_are_the_text(target: Target) -> None:
    tokens = target.tokenizer(TEXT)["input_ids"]
    assert len(tokens) > 4 * CONTEXT + 40  # or nothing is forgotten on the way
    for seed in range(5):
        stream = TextStream(target)
        pieces = told(stream, tokens, seed)
        assert "".join(pieces) == target.text(tokens) == TEXT
        assert "\ufffd" not in "".join(pieces) and stream.count == len(tokens)
        assert sum(map(bool, pieces)) > 20


def test_text_that_is_broken_comes_out_as_it_is(target: Target) -> None:
    chance = random.Random(0)
    for seed in range(5):
        tokens = [chance.randrange(256) for _ in range(300)]
        assert "".join(told(TextStream(target), tokens, seed)) == target.text(tokens)


def byte_fallback() -> Tokenizer:
    """A tokenizer of letters and bytes, as those of Llama 2 and Gemma are."""
    pieces = ["\u2581", "a", "b", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    fused = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*fused, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(["</s>"])
    return made


def test_bytes_of_a_tokenizer_that_falls_back_to_them() -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=byte_fallback(), eos_token="</s>")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(made), num_attention_heads=2, **sizes)
    target = wrap_target(LlamaForCausalLM(config), made)
    characters = [[4 + byte for byte in one.encode()] for one in "\u20ac\xe9"]
    chance = random.Random(2)
    for seed in range(50):
        tokens: list[int] = []
        for _ in range(60):
            tokens += chance.choice([[0], [1], [2], [3], *characters])
        tokens += [1, 4 + 0xC3] * (seed % 2)  # an unfinished character at the end
        assert "".join(told(TextStream(target), tokens, seed)) == target.text(tokens)
    stray = [4 + 0xC3, 4 + 0xA9, 4 + 0xA9, 2]  # which makes the whole run of bytes invalid
    assert target.text(stray) == "\ufffd\ufffd\ufffdb"
    stream = TextStream(target)
    pieces = [*(stream.add([token]) for token in stray), stream.end()]
    assert pieces[:2] == ["", "\xe9"] and pieces[2:] == ["", "\ufffd\ufffdb", ""]


def test_stop_strings_do_not_depend_on_the_steps(target: Target) -> None:
    chance = random.Random(1)
    for seed in range(200):
        text = "".join(chance.choice("ab\u20ac") for _ in range(30))
        stops = ["".join(chance.choice("ab\u20ac") for _ in range(3)) for _ in range(2)]
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        stream = TextStream(target, stops)
        shown = "".join(told(stream, target.tokenizer(text)["input_ids"], seed))
        if not ends:
            assert (shown, stream.stopped) == (text, False)
            continue
        end, begin = min(ends)
        assert (shown, stream.stopped) == (text[:begin], True)
        assert stream.count == len(target.tokenizer(text[:end])["input_ids"])


def test_of_two_stop_strings_the_first_complete_one_counts(target: Target) -> None:
    for seed in range(5):
        stream = TextStream(target, ["bcde", "c"])
        assert "".join(told(stream, target.tokenizer("abcdef")["input_ids"], seed)) == "ab"


def test_what_may_be_a_stop_string_waits(target: Target) -> None:
    stream = TextStream(target, ["stop"])
    ids = target.tokenizer("a sto")["input_ids"]
    assert stream.add(ids) == "a " and stream.waiting
    assert stream.add(target.tokenizer("re")["input_ids"]) == "store" and not stream.waiting
