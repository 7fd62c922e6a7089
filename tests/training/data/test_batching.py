"""Conversations become the right tokens, spans and batches; what is wrong is said by name.

Legend: B batch rows, T positions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_model import save
from tiny_run import VOCAB, mixed_rows, tiny_target, write_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from headstart.model.target.load import load_target
from headstart.model.target.target import Target
from headstart.training.config.schema import DataConfig
from headstart.training.data.batching import (
    Batches,
    Corpus,
    frequent_tokens,
    padded_length,
    rank_slices,
)
from headstart.training.data.chat_template import render
from headstart.training.data.conversations import grouped_by_length, read_conversations

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIPS = (
    "{{ bos_token }}{% for message in messages %}{{ '<|header|>' + message['role'] + '<|body|>\n\n'"
    " + message['content'] | trim + '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|header|>assistant<|body|>\n\n' }}{% endif %}"
)
THINKS = (  # reasoning stays in the last answer only
    "{% for message in messages %}{% set text = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in text %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PLAIN = (  # no special token at all, and a space that an answer's first word would swallow
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
INST = (  # the prompt ends inside the user's turn; spaces around
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + '<|eot|>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {"smollm2": SMOLLM2, "strips": STRIPS, "thinks": THINKS, "plain": PLAIN, "inst": INST}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|header|>", "<|body|>", "<|eot|>", "<|bos|>"]
CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "<think>\nadd them\n</think>\n\nIt is four.  "},
    {"role": "user", "content": "And a list?"},
    {"role": "assistant", "content": "\n- one\n- two"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges across word and line boundaries."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    texts = ["assistant: \n\n- one\n- two", "user: What is", "assistant\n\n- one", ": \n-"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|bos|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL[:5],
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_spans_stand_behind_what_the_target_reads(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name]
    spans = [(row, start, end) for row in render(CHAT, tokenizer) for start, end in row.spans]
    assert len(spans) == 2
    for index, (row, start, end) in zip((1, 3), spans, strict=True):
        prompt = tokenizer.apply_chat_template(
            CHAT[:index], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert row.tokens[:start] == prompt
        answer = tokenizer.decode(row.tokens[start:end], skip_special_tokens=True)
        written = CHAT[index]["content"]
        assert answer.strip() == written.strip()
        ends_turn = row.tokens[end - 1] in tokenizer.all_special_ids
        assert ends_turn == (name != "plain")
        assert len(set(row.tokens[start:end]) & set(tokenizer.all_special_ids)) == int(ends_turn)


def test_one_sequence_unless_history_is_rewritten(tokenizer):
    counts = {}
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        counts[name] = len(render(CHAT, tokenizer))
    assert counts.pop("thinks") == 2
    assert set(counts.values()) == {1}


def test_no_chat_template_is_an_error(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        render(CHAT, tokenizer)


def read(target: Target, path: Path, **settings: Any):
    return read_conversations(DataConfig(path=str(path), **settings), target, seed=0)


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target()


def write(path: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n" if text else "")
    return path


GOOD = {"tokens": [1, 2, 3, 4, 5], "spans": [[2, 5]]}
BAD = [
    (["{broken"], "data.jsonl:1 is not valid JSON"),
    ([GOOD, "[]"], "data.jsonl:2 holds list"),
    ([GOOD, {"text": "x"}], r"data.jsonl:2 has neither `tokens` with `spans` nor `messages`.*text"),
    ([{"tokens": [1, 2, VOCAB], "spans": [[2, 3]]}], "data.jsonl:1: token 48 is not in the vocab"),
    ([{"tokens": [1, 2, -1], "spans": [[2, 3]]}], "data.jsonl:1: token -1 is not in the vocab"),
    ([{"tokens": [1, 2, 3], "spans": [[2, 4]]}], "data.jsonl:1: the span .2, 4. does not lie"),
    ([{"tokens": [1, 2, 3], "spans": [["a", 3]]}], "data.jsonl:1: the span"),
    ([{"tokens": [1, 2, 3], "spans": 7}], "data.jsonl:1: `spans` should be a list"),
    ([{"tokens": ["a"], "spans": []}], "data.jsonl:1: `tokens` should be a list of whole numbers"),
    ([{"messages": [{"role": "user"}]}], "data.jsonl:1: `messages` should be a list of objects"),
    ([], "data.jsonl is empty"),
    ([{"tokens": [1, 2, 3], "spans": []}], "Nothing to train on"),
    ([{"tokens": [1, 2, 3, 4], "spans": [[0, 2]]}], "Nothing to train on"),  # no anchor before it
]


@pytest.mark.parametrize(("lines", "message"), BAD)
def test_broken_data_is_named(target, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read(target, write(tmp_path / "data.jsonl", *lines))


def test_messages_need_a_tokenizer(target, tmp_path):
    path = write(tmp_path / "data.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match="no tokenizer"):
        read(target, path)


def test_missing_file_and_folder(target, tmp_path):
    with pytest.raises(ValueError, match="Cannot read the data file"):
        read(target, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="Cannot open the data"):
        read(target, tmp_path / "none")


def test_broken_lines_are_skipped_only_when_asked(target, tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD, "{broken", {"tokens": [99], "spans": []}, GOOD)
    found = read(target, path, skip_broken=True)
    assert len(found.train) == 2
    assert [line.split(":")[1].split()[0] for line in found.broken] == ["2", "3"]


def test_long_conversations_are_cut_and_empty_ones_dropped(target, tmp_path):
    late = {"tokens": [1] * 9, "spans": [[8, 9]]}
    path = write(tmp_path / "data.jsonl", {"tokens": [1] * 9, "spans": [[2, 4], [5, 9]]}, late)
    found = read(target, path, max_length=6, global_batch_tokens=6)
    assert found.dropped == 1
    assert found.train.lengths.tolist() == [6]
    assert found.train.trained.tolist() == [False, False, True, True, False, True]


def test_a_folder_goes_through_datasets(target, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD, GOOD, {"tokens": [7, 8, 9], "spans": [[2, 3]]})
    found = read(target, folder)
    assert found.train.tokens.tolist() == [1, 2, 3, 4, 5] * 2 + [7, 8, 9]


def test_holdout_is_apart_and_repeatable(target, tmp_path):
    rows = [[index, 1, 2, index] for index in range(20)]
    path = write_rows(tmp_path / "data.jsonl", rows, start=2)
    first, again = read(target, path, holdout=5), read(target, path, holdout=5)
    held = first.holdout.tokens.view(-1, 4)[:, 0].tolist()
    kept = first.train.tokens.view(-1, 4)[:, 0].tolist()
    assert sorted(held + kept) == list(range(20)) and len(held) == 5
    assert torch.equal(first.holdout.tokens, again.holdout.tokens)
    with pytest.raises(ValueError, match="holdout is 20"):
        read(target, path, holdout=20)


@pytest.fixture
def batches() -> Batches:
    lengths = torch.randint(3, 100, (300,), generator=torch.Generator().manual_seed(1))
    return Batches(lengths, global_batch_tokens=256, seed=4)


def test_every_row_once_per_epoch_under_the_budget(batches):
    start = 0
    orders = []
    for epoch in range(1, 4):
        end = batches.count(epoch)
        plan = [batches.at(position) for position in range(start, end)]
        assert sorted(row for rows in plan for row in rows) == list(range(300))
        assert all(int(batches.lengths[rows].max()) * len(rows) <= 256 for rows in plan)
        orders.append(plan)
        start = end
    assert orders[0] != orders[1] != orders[2]
    padded = sum(int(batches.lengths[rows].max()) * len(rows) for rows in orders[0])
    assert padded < 1.25 * int(batches.lengths.sum())  # rows of a batch have similar lengths


def test_few_lengths_occur():
    columns = [padded_length(length, 1000) for length in range(1, 1001)]
    assert all(0 <= c - n <= n / 8 for n, c in enumerate(columns, 1))
    assert max(columns) == 1000 and len(set(columns)) < 70


def test_a_position_means_the_same_whenever_it_is_asked_for(batches):
    late = batches.count(2) + 3
    expected = [batches.at(position) for position in range(late + 1)]
    fresh = Batches(batches.lengths, global_batch_tokens=256, seed=4)
    assert fresh.at(late) == expected[late]
    assert fresh.at(1) == expected[1]
    assert Batches(batches.lengths, global_batch_tokens=256, seed=5).at(1) != expected[1]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_parts_of_all_ranks_are_the_batch(count):
    corpus = Corpus((row, [(2, len(row))]) for row in mixed_rows(5))
    whole = corpus.batch(range(5))
    seen = []
    for rank in range(count):
        part = corpus.batch(range(5), rank, count)
        assert part.tokens_BT.shape == part.loss_mask_BT.shape
        assert part.filler == (rank >= 5)
        slices = rank_slices(5, rank, count)
        assert torch.equal(part.tokens_BT, whole.tokens_BT[slices])  # the same padding
        for row in range(len(part.lengths_B)):
            length = int(part.lengths_B[row])
            if bool(part.loss_mask_BT[row].any()):
                seen.append(part.tokens_BT[row, :length].tolist())
                assert part.loss_mask_BT[row].sum() == length - 2
    assert sorted(seen) == sorted(mixed_rows(5))
    parts = [corpus.batch(range(5), rank, count) for rank in range(count)]
    assert sum(part.num_tokens for part in parts) == whole.num_tokens


def test_held_out_batches_cover_all():
    corpus = Corpus((row, [(2, len(row))]) for row in mixed_rows(9))
    found = [corpus.batch(rows) for rows in grouped_by_length(corpus, 64)]
    assert all(batch.tokens_BT.numel() <= 64 for batch in found)
    assert sum(int(batch.loss_mask_BT.sum()) for batch in found) == int(corpus.trained.sum())


def test_frequent_tokens():
    corpus = Corpus([([5, 5, 7, 7, 7, 2, 2, 9], [(1, 8)]), ([9] * 9, [])])
    counts_V = corpus.token_counts(12)
    assert counts_V.tolist() == [0, 0, 2, 0, 0, 1, 0, 3, 0, 1, 0, 0]
    assert frequent_tokens(counts_V, 3).tolist() == [2, 5, 7]
    with pytest.raises(ValueError, match="draft_vocab is 13"):
        frequent_tokens(counts_V, 13)


def test_turns_of_a_conversation_are_held_out_together(target, tmp_path):
    lines = [
        {"id": f"c/{c}/{turn}", "tokens": [c, turn, 1, 2], "spans": [[2, 4]]}
        for c in range(10)
        for turn in range(3)
    ]
    found = read(target, write(tmp_path / "data.jsonl", *lines), holdout=4)
    held = found.holdout.tokens.view(-1, 4)[:, 0].tolist()
    kept = found.train.tokens.view(-1, 4)[:, 0].tolist()
    assert len(held) == 6 and len(kept) == 24 and not set(held) & set(kept)


def test_a_line_that_is_no_text_is_named(target, tmp_path):
    path = write(tmp_path / "data.jsonl", GOOD, GOOD)
    path.write_bytes(path.read_bytes() + b'{"tokens": "\xff"}\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:3 is not valid JSON in UTF-8"):
        read(target, path)
    assert len(read(target, path, skip_broken=True).train) == 2


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Target:
    return load_target(save(tmp_path_factory.mktemp("target")))


ASKED = {"role": "user", "content": "a?"}
ANSWERED = {"role": "assistant", "content": "b!"}


def test_conversations_without_an_answer_are_counted(chatting, tmp_path):
    lines = [{"messages": [ASKED, ANSWERED]}, {"messages": [ASKED]}, {"messages": []}]
    found = read(chatting, write(tmp_path / "data.jsonl", *lines))
    assert (len(found.train), found.dropped) == (1, 2)


def test_messages_of_a_data_set_are_rendered(chatting, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", *[{"messages": [ASKED, ANSWERED]}] * 3)
    found = read(chatting, folder).train
    assert len(found) == 3
    assert chatting.text(found.tokens[found.trained].tolist()) == "b!" * 3
