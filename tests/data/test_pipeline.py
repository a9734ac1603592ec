"""Global batches: complete epochs, the mixture's shares, and the same rows on any number of hosts and workers."""

import itertools
import json

import numpy as np
import pytest

from ml.data.config import DataConfig, SourceConfig, TokenizerConfig
from ml.data.pipeline import heldout_batches, make_loader
from ml.data.prepare import prepare
from ml.errors import UserError

LENGTH = 16


def _corpus(path, letter, count):
    rng = np.random.default_rng(ord(letter))
    with open(path, "w") as file:
        for i in range(count):
            text = f"{i} " + " ".join(f"{letter}{n}" for n in rng.integers(0, 99, size=int(rng.integers(1, 12))))
            file.write(json.dumps({"text": text}) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    _corpus(folder / "a.jsonl", "a", 120)
    _corpus(folder / "b.jsonl", "b", 40)
    return folder


def _prepare(folder, weights=(3.0, 1.0), **changes):
    sources = tuple(
        SourceConfig(kind="jsonl", path=str(folder / f"{name}.jsonl"), weight=weight)
        for name, weight in zip("ab", weights, strict=False)
    )
    settings = {"tokenizer": TokenizerConfig(vocab_size=280), "sequence_length": LENGTH, "heldout_fraction": 0.1}
    return prepare(DataConfig(sources=sources, **{**settings, **changes}), folder)


@pytest.fixture(scope="module")
def prepared(folder):
    return _prepare(folder)


def _take(loader, count):
    return list(itertools.islice(loader, count))


def _global(prepared, count, *, shards, batch=8, seed=3, states=None, workers=0):
    """Global batches as all hosts together see them, and the states the hosts end in."""
    loaders = [
        make_loader(
            prepared, global_batch_size=batch, seed=seed, shard_index=i, shard_count=shards, num_workers=workers
        )
        for i in range(shards)
    ]
    for loader, state in zip(loaders, states or [], strict=False):
        loader.set_state(json.loads(json.dumps(state)))
    parts = [_take(loader, count) for loader in loaders]
    states = [loader.get_state() for loader in loaders]
    for loader in loaders:
        loader.close()
    batches = [
        {name: np.concatenate([part[name] for part in hosts]) for name in hosts[0]}
        for hosts in zip(*parts, strict=True)
    ]
    return batches, states


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0, 3), (1, 2)], [(0, 1, 2), (1, 2, 3)]])
def test_each_host_has_its_parts_of_every_microbatch(prepared, parts):
    """Microbatches hold the same rows on any number of hosts, also where two hosts share rows."""
    whole = _take(make_loader(prepared, global_batch_size=16, seed=3), 3)
    for mine in parts:
        loader = make_loader(prepared, global_batch_size=16, seed=3, shard_index=mine, shard_count=4, microbatches=2)
        for batch, expected in zip(_take(loader, 3), whole, strict=True):
            for name, x in expected.items():
                rows = x.reshape(2, 4, 2, -1)[:, list(mine)].reshape(-1, x.shape[1])
                np.testing.assert_array_equal(batch[name], rows)
        loader.close()


def _assert_equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def _row_keys(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_an_epoch_shows_every_row_once_and_each_epoch_in_another_order(folder):
    prepared = _prepare(folder, weights=(1.0,))
    rows = prepared.train_rows
    batches = _take(make_loader(prepared, global_batch_size=1, seed=0), 3 * rows)
    epochs = [_row_keys(batches[start : start + rows]) for start in range(0, 3 * rows, rows)]
    assert len(set(epochs[0])) == rows
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_neighbouring_seeds_share_no_epoch(folder):
    prepared = _prepare(folder, weights=(1.0,))
    rows = prepared.train_rows
    seen = set()
    for seed in range(4):
        keys = _row_keys(_take(make_loader(prepared, global_batch_size=1, seed=seed), 2 * rows))
        seen |= {tuple(keys[:rows]), tuple(keys[rows:])}
    assert len(seen) == 8


def test_the_seed_alone_decides(prepared):
    one, _ = _global(prepared, 5, shards=1, seed=7)
    same, _ = _global(prepared, 5, shards=1, seed=7)
    other, _ = _global(prepared, 5, shards=1, seed=8)
    _assert_equal(one, same)
    assert _row_keys(one) != _row_keys(other)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (1.0, 9.0), (0.2, 0.1)])
def test_sources_appear_by_weight_from_the_start(folder, weights):
    prepared = _prepare(folder, weights=weights)
    batches = _take(make_loader(prepared, global_batch_size=10, seed=0), 40)
    rows = [prepared.tokenizer.decode(row) for batch in batches for row in batch["tokens"]]
    is_a = np.array(["a" in row for row in rows])
    assert not any("a" in row and "b" in row for row in rows)
    share = weights[0] / sum(weights)
    for count in (40, 400):
        assert abs(is_a[:count].sum() - share * count) <= 2 + 0.01 * count


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (4, 1), (2, 4), (8, 2)])
def test_resume_on_another_number_of_hosts_gives_the_same_global_batches(prepared, before, after):
    expected, final = _global(prepared, 12, shards=1)
    first, states = _global(prepared, 5, shards=before)
    assert len({json.dumps(state) for state in states}) == 1, "every host saves the same state"
    second, states = _global(prepared, 7, shards=after, states=[states[-1]] * after)
    _assert_equal(first + second, expected)
    assert states[0] == final[0]


def test_worker_processes_change_nothing_and_can_come_and_go(prepared):
    expected, _ = _global(prepared, 9, shards=1)
    first, states = _global(prepared, 4, shards=1, workers=2)
    second, _ = _global(prepared, 5, shards=2, states=states * 2)
    _assert_equal(first + second, expected)


def test_resume_with_another_batch_size_continues_with_the_next_row(prepared):
    expected, _ = _global(prepared, 12, shards=1, batch=4)
    first, states = _global(prepared, 3, shards=1, batch=8)
    second, _ = _global(prepared, 6, shards=1, batch=4, states=states)
    assert _row_keys(first + second) == _row_keys(expected)


def test_set_state_on_a_running_loader_rewinds_it(prepared):
    loader = make_loader(prepared, global_batch_size=4, seed=0)
    state = loader.get_state()
    first = _take(loader, 3)
    loader.set_state(state)
    _assert_equal(_take(loader, 3), first)
    loader.close()
    assert loader.get_state()["next_row"] == 12
    fourth = next(loader)
    _assert_equal([fourth], _take(make_loader(prepared, global_batch_size=4, seed=0), 4)[3:])


def test_state_of_other_data_is_refused(folder, prepared):
    state = make_loader(prepared, global_batch_size=4, seed=0).get_state()
    others = [
        make_loader(prepared, global_batch_size=4, seed=1),
        make_loader(_prepare(folder, weights=(1.0, 1.0)), global_batch_size=4, seed=0),
        make_loader(_prepare(folder, sequence_length=24), global_batch_size=4, seed=0),
        make_loader(_prepare(folder, weights=(1.0,)), global_batch_size=4, seed=0),
    ]
    for loader in others:
        with pytest.raises(UserError, match="checkpoint was written with other data"):
            loader.set_state(state)
    # The same mixture in other units, and files that were only copied, are the same data.
    make_loader(_prepare(folder, weights=(6.0, 2.0)), global_batch_size=4, seed=0).set_state(state)


def test_copied_files_are_the_same_data(folder, prepared, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes((folder / f"{name}.jsonl").read_bytes())
    copied = make_loader(_prepare(tmp_path), global_batch_size=4, seed=0)
    copied.set_state(make_loader(prepared, global_batch_size=4, seed=0).get_state())


@pytest.mark.parametrize("batch", [1, 4, 32, 1000])
def test_held_out_pass_counts_every_target_once(prepared, batch):
    batches = heldout_batches(prepared, global_batch_size=batch)
    once, twice = list(batches), list(batches)
    assert len(once) == len(batches)
    _assert_equal(once, twice)
    assert {b["tokens"].shape for b in once} == {(batch, LENGTH)}
    total = sum(b["loss_mask"].sum() for b in once)
    assert total == sum(source.heldout.targets for source in prepared.sources)
    filled = [key for key in _row_keys(once) if any(key)]
    assert len(filled) == prepared.heldout_rows


def test_held_out_pass_is_the_same_on_several_hosts(prepared):
    expected = list(heldout_batches(prepared, global_batch_size=8))
    parts = [list(heldout_batches(prepared, global_batch_size=8, shard_index=i, shard_count=4)) for i in range(4)]
    found = [
        {name: np.concatenate([part[name] for part in hosts]) for name in hosts[0]}
        for hosts in zip(*parts, strict=True)
    ]
    _assert_equal(found, expected)


def test_nothing_held_out_is_an_empty_pass(folder):
    batches = heldout_batches(_prepare(folder, heldout_fraction=0.0), global_batch_size=8)
    assert len(batches) == 0 and list(batches) == []


def test_bad_divisions_are_refused(prepared):
    with pytest.raises(
        UserError, match="global batch size 7 is not a positive multiple of 2 parts x 1 microbatches: use 8"
    ):
        make_loader(prepared, global_batch_size=7, seed=0, shard_count=2)
    with pytest.raises(UserError, match="use 2"):
        heldout_batches(prepared, global_batch_size=0, shard_count=2)
    with pytest.raises(UserError, match="8 is not a positive multiple of 2 parts x 3 microbatches: use 12"):
        make_loader(prepared, global_batch_size=8, seed=0, shard_count=2, microbatches=3)
    with pytest.raises(ValueError, match=r"shard_index=\(1, 0\) must lie .* ascending"):
        make_loader(prepared, global_batch_size=8, seed=0, shard_index=(1, 0), shard_count=2)
    with pytest.raises(ValueError, match="shard_index=2"):
        make_loader(prepared, global_batch_size=4, seed=0, shard_index=2, shard_count=2)
