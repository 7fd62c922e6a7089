"""What the thread makes is what the main one would make; its errors and its end are seen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored_states import recipe_for, write
from tiny_run import mixed_rows, tiny_head, tiny_recipe, tiny_target, write_rows

from headstart.model.target.target import Target
from headstart.training.data.batching import Corpus
from headstart.training.data.prefetch import Prefetcher
from headstart.training.distributed.process_group import WorkerGroup
from headstart.training.trainer import train

NAME = "headstart-feed"


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith(NAME)]


@pytest.fixture(scope="module")
def target() -> Target:
    return tiny_target(layers=4)


@pytest.fixture
def corpus() -> Corpus:
    return Corpus((row, [(2, len(row))]) for row in mixed_rows(30))


@pytest.fixture
def feed(corpus) -> Iterator[Prefetcher]:
    recipe = tiny_recipe(Path("run"), Path("data.jsonl"), accumulate=2)
    feed = Prefetcher(recipe, corpus, None, WorkerGroup(torch.device("cpu")), torch.float32)
    yield feed
    feed.close()
    assert not threads()


def test_a_gpu_has_its_number():
    """Without one, a thread cannot choose it."""
    team = WorkerGroup(torch.device("cpu"))
    team.accelerator = SimpleNamespace(device=torch.device("cuda"))
    assert team.device == torch.device("cuda", 0)


def test_batches_are_those_of_their_places_and_come_ahead(feed, corpus):
    made: list[int] = []
    plain = feed._steps.make
    feed._steps.make = lambda place: made.append(place) or plain(place)
    assert not threads()  # none before the first call
    for position in (0, 2, 4, 14):  # a run that goes on jumps
        pairs = feed.step(position, final=position == 14)
        for index, (whole, ours) in enumerate(pairs):
            expected = corpus.batch(feed.batches.at(position + index))
            for batch in (whole, ours):
                assert torch.equal(batch.tokens_BT, expected.tokens_BT)
                assert torch.equal(batch.loss_mask_BT, expected.loss_mask_BT)
                assert torch.equal(batch.lengths_B, expected.lengths_B)
    feed.close()
    assert made == [0, 2, 4, 6, 14]  # nothing behind the end


def test_an_error_comes_where_its_place_is_asked_for(feed):
    plain = feed._steps.make

    def make(place: int):
        if place == 2:
            raise ValueError("the shard is broken")
        return plain(place)

    feed._steps.make = make
    feed.step(0, final=False)
    with pytest.raises(ValueError, match="the shard is broken"):
        feed.step(2, final=False)


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
