"""The thread's batches are those of their positions; its errors and its end are seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored_states import conversations, recipe_for, write
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.model.target.target import Target
from headstart.training.data.batching import Corpus
from headstart.training.data.conversations import Conversations
from headstart.training.data.hidden_states import open_features
from headstart.training.data.prefetch import Prefetcher
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.trainer import train

NAME = "headstart-prefetch"
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith(NAME)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=4)


@pytest.fixture
def corpus() -> Corpus:
    return Corpus((row, [(2, len(row))]) for row in mixed_rows(30))


@pytest.fixture
def data(corpus) -> Iterator[Prefetcher]:
    recipe = tiny_recipe(Path("run"), Path("data.jsonl"), accumulate=2)
    holdout = Corpus(((row, [(2, len(row))]) for row in mixed_rows(5)), len(corpus))
    split = Conversations(corpus, holdout, 0, ())
    data = Prefetcher(recipe, split, rank=0, world_size=1, **CPU)
    yield data
    data.close()
    assert not threads()


def test_a_gpu_has_its_number():
    """Without one, a thread cannot choose it."""
    workers = WorkerGroup(torch.device("cpu"))
    workers.accelerator = SimpleNamespace(device=torch.device("cuda"))
    assert workers.device == torch.device("cuda", 0)


def test_batches_are_those_of_their_positions_and_made_ahead(data, corpus):
    made: list[int] = []
    make = data._steps.make
    data._steps.make = lambda place: made.append(place) or make(place)
    assert not threads()  # none before the first call
    for position in (0, 2, 4, 14):  # a resumed run jumps
        batches = data.step(position, final=position == 14)
        on_device = list(data.on_device(batches, position, final=position == 14))
        assert [last for _, last in on_device] == [False, True]
        for index, (batch, _) in enumerate(on_device):
            expected = corpus.batch(data.batches.at(position + index))
            assert torch.equal(batch.tokens_BT, expected.tokens_BT)
            assert torch.equal(batch.loss_mask_BT, expected.loss_mask_BT)
            assert torch.equal(batch.lengths_B, expected.lengths_B)
    data.close()
    assert made == [0, 2, 4, 6, 14]  # nothing after the end


def test_holdout_batches_hold_every_conversation_once(data):
    batches = list(data.holdout())
    rows = sorted(row for batch in batches for row in batch.rows_B.tolist())
    assert rows == list(range(30, 35)) and all(batch.whole is None for batch in batches)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_each_batch_and_know_the_whole_one_if_asked(data, corpus, ranks):
    recipe = tiny_recipe(Path("run"), Path("data.jsonl"), accumulate=2)
    whole = data.step(0, final=True)
    found: list[list[int]] = [[], []]
    for rank in range(ranks):
        part = Prefetcher(recipe, data.data, rank=rank, world_size=ranks, whole=True, **CPU)
        for index, batch in enumerate(part.step(0, final=True)):
            assert torch.equal(batch.whole.tokens_BT, whole[index].tokens_BT)
            found[index] += [] if batch.filler else batch.rows_B.tolist()
        assert all(batch.whole is not None for batch in part.holdout())
        part.close()
    for index, rows in enumerate(found):
        assert sorted(rows) == sorted(whole[index].rows_B.tolist())


def test_an_error_is_raised_where_its_batch_is_asked_for(data):
    make = data._steps.make

    def failing(place: int):
        if place == 2:
            raise ValueError("the shard is broken")
        return make(place)

    data._steps.make = failing
    data.step(0, final=False)
    with pytest.raises(ValueError, match="the shard is broken"):
        data.step(2, final=False)


def test_stored_hidden_states_come_with_every_batch(target, tmp_path):
    """The one route of stored values: in training and on held-out conversations."""
    rows = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    recipe = recipe_for(tmp_path / "run", rows, tmp_path / "features")
    write(tmp_path / "features", recipe, target)
    split = conversations(recipe, target)
    head = tiny_head(target, "eagle3")
    features = open_features(recipe, split, target, head)
    data = Prefetcher(recipe, split, features, rank=0, world_size=1, **CPU)
    steps = [data.on_device(data.step(at, final=at == 2), at, final=at == 2) for at in (0, 2)]
    batches = [batch for step in steps for batch, _ in step]
    held_out = list(data.holdout())
    assert len(batches) == 4 and held_out
    for batch in batches + held_out:
        expected = target.forward_train(batch.tokens_BT, batch.lengths_B, head.taps)
        for row, length in enumerate(batch.lengths_B.tolist()):
            stored = batch.stored_LBTD[-1, row, :length]
            near = expected.lm_head_input_BTD[row, :length]
            torch.testing.assert_close(stored, near, rtol=0, atol=1e-5)
    data.close()


def test_a_shard_that_breaks_during_the_run_ends_it(target, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", mixed_rows(24))
    folder: Path = tmp_path / "features"
    write(folder, recipe_for(tmp_path, data), target, shard_bytes=2_000)
    for shard in sorted(folder.glob("*.safetensors"))[1:]:
        shard.write_bytes(b"x" + shard.read_bytes()[1:])
    recipe = recipe_for(tmp_path / "run", data, folder)
    with pytest.raises(ValueError, match="has changed since it was written"):
        train(recipe, target=target, head=tiny_head(target, "eagle3", draft_vocab=20))
    assert not threads()
