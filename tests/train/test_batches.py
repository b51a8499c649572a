"""Which tokens a step sees: nothing but the step decides, every window once an epoch, no target in another document."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import ShardWriter, open_shards
from shoal.errors import ConfigError
from shoal.train.batches import IGNORE, Batches, Windows, permute, split


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """101 documents of 1 to 20 tokens that are all different, in several shards."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    lengths = np.random.default_rng(0).integers(1, 21, 101)
    with ShardWriter(folder, vocab_size=2000, tokenizer_digest="0" * 64, shard_tokens=100) as writer:
        for length, end in zip(lengths, np.cumsum(lengths), strict=True):
            writer.add(np.arange(end - length, end))
    return open_shards(folder)


@given(size=st.integers(1, 300), key=st.text(max_size=5))
@settings(max_examples=50, deadline=None)
def test_permute_visits_everything_once(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_is_what_it_was_and_mixes():
    assert [permute(index, 10, "0/0") for index in range(10)] != [permute(index, 10, "0/1") for index in range(10)]
    moved = np.array([permute(index, 5000, "a") for index in range(5000)])
    assert abs(np.corrcoef(moved, np.arange(5000))[0, 1]) < 0.05
    assert abs(np.corrcoef(moved[1:], moved[:-1])[0, 1]) < 0.05


def test_targets_follow_and_never_cross_documents(shards):
    windows = Windows(shards=shards, start=0, stop=shards.num_tokens, length=16)
    batch = windows.read(list(range(len(windows))))
    assert batch.tokens_BT.shape == (len(windows), 16)
    documents = shards.document_at(batch.tokens_BT.ravel()).reshape(
        batch.tokens_BT.shape
    )  # a token is its own position
    crosses = shards.document_at(batch.tokens_BT + 1) != documents
    assert crosses.any()
    assert (batch.targets_BT == np.where(crosses, IGNORE, batch.tokens_BT + 1)).all()
    assert (batch.documents_BT == documents - documents[:, :1]).all()


def test_an_epoch_reads_every_window_once_in_another_order(shards):
    windows = Windows(shards=shards, start=0, stop=shards.num_tokens, length=16)
    batches = Batches(windows=windows, batch=1, seed=7)
    epochs = [[batches.window_at(epoch * len(windows) + i) for i in range(len(windows))] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(len(windows))) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [Batches(windows=windows, batch=1, seed=8).window_at(i) for i in range(len(windows))]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_a_step_has_the_same_rows_for_any_number_of_processes(shards, world):
    windows = Windows(shards=shards, start=0, stop=shards.num_tokens, length=8)
    batches = Batches(windows=windows, batch=6, seed=1)
    for step in (0, 5, 1000):
        whole = batches.batch_at(step)
        shares = [batches.batch_at(step, rank=rank, world=world) for rank in range(world)]
        for field in range(3):
            assert (np.concatenate([share[field] for share in shares]) == whole[field]).all()


def test_batches_that_cannot_be_shared_are_an_error(shards):
    windows = Windows(shards=shards, start=0, stop=shards.num_tokens, length=8)
    with pytest.raises(ConfigError, match="6 sequences cannot be shared evenly by 4"):
        Batches(windows=windows, batch=6, seed=1).batch_at(0, world=4)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_no_document_is_on_both_sides_of_the_split(shards, share):
    train, held_out = split(shards, 4, share)
    assert held_out is not None
    assert train.stop == held_out.start
    before, after = shards.document_at(np.array([train.stop - 1, train.stop]))
    assert before != after
    assert abs((held_out.stop - held_out.start) / shards.num_tokens - share) < 20 / shards.num_tokens


def test_nothing_is_held_out_unless_asked(shards):
    train, held_out = split(shards, 4, 0.0)
    assert held_out is None
    assert (train.start, train.stop) == (0, shards.num_tokens)


def test_too_little_data_is_an_error(shards):
    with pytest.raises(ConfigError, match=r"data: \d+ tokens in .* too few for a sequence of 100000"):
        split(shards, 100_000, 0.0)
    with pytest.raises(ConfigError, match=r"data\.held_out: \d+ tokens"):
        split(shards, 400, 0.02)
