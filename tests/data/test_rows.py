"""The stored rows, held against a slow reading of the documents themselves."""

import itertools
import pickle

import numpy as np
import pytest

from ml.data import rows as rows_module
from ml.data.rows import PackedRows, RowWriter, empty_batch, gather

BOS, EOS = 1, 2


def _documents(rng, count, longest=40):
    return [rng.integers(3, 1000, size=int(rng.integers(0, longest))).tolist() for _ in range(count)]


def _write(folder, documents, length, *, bos=BOS, eos=EOS, vocab_size=1000):
    writer = RowWriter(folder, sequence_length=length, bos_id=bos, eos_id=eos, vocab_size=vocab_size)
    for document in documents:
        writer.add(document, num_bytes=3 * len(document))
    writer.finish()
    return PackedRows(folder)


def _segments(batch):
    """Yields (tokens, targets) of every segment, checking the layout of the row on the way."""
    for row in range(len(batch["tokens"])):
        ids = batch["segment_ids"][row]
        last = int(ids.max())
        filled = int((ids > 0).sum())
        assert (ids[filled:] == 0).all() and (np.diff(ids[:filled]) >= 0).all(), "segments are contiguous, then padding"
        assert sorted(set(ids[:filled].tolist())) == list(range(1, last + 1)), "segments count 1, 2, ..."
        np.testing.assert_array_equal(batch["loss_mask"][row], (ids > 0).astype(np.float32))
        for name in ("tokens", "targets", "positions"):
            assert (batch[name][row, filled:] == 0).all()
        for segment in range(1, last + 1):
            here = ids == segment
            np.testing.assert_array_equal(batch["positions"][row][here], np.arange(here.sum()))
            yield batch["tokens"][row][here].tolist(), batch["targets"][row][here].tolist()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [2, 7, 32, 200])
def test_every_pair_of_every_document_appears_exactly_once(tmp_path, monkeypatch, seed, length):
    monkeypatch.setattr(rows_module, "PACKING_WINDOW", 16)  # several windows in a small test
    documents = _documents(np.random.default_rng(seed), 60)
    store = _write(tmp_path / "rows", documents, length)
    expected = []
    for document in documents:
        sequence = [BOS, *document, EOS]
        pairs = list(itertools.pairwise(sequence))
        expected += [tuple(pairs[start : start + length]) for start in range(0, len(pairs), length)]
    batch = gather([store], np.arange(len(store)))
    found = [tuple(zip(tokens, targets, strict=True)) for tokens, targets in _segments(batch)]
    # Whole chunks are compared, so no target can come from another document.
    assert sorted(found) == sorted(expected)
    assert store.documents == len(documents)
    assert store.bytes == 3 * sum(map(len, documents))
    assert store.targets == batch["loss_mask"].sum() == sum(len(d) + 1 for d in documents)


def test_targets_are_the_next_tokens_within_a_segment(tmp_path):
    store = _write(tmp_path / "rows", _documents(np.random.default_rng(0), 30), 16)
    for tokens, targets in _segments(gather([store], np.arange(len(store)))):
        assert targets[:-1] == tokens[1:]


@pytest.mark.parametrize("vocab_size", [2**16, 2**16 + 1, 2**31 - 1])
def test_large_ids_survive(tmp_path, vocab_size):
    document = [vocab_size - 1, 5, vocab_size - 2]
    store = _write(tmp_path / "rows", [document], 8, vocab_size=vocab_size)
    assert gather([store], np.array([0]))["tokens"][0, :4].tolist() == [BOS, *document]


def test_arrays_have_the_promised_types_and_shapes(tmp_path):
    store = _write(tmp_path / "rows", [[5, 6, 7]], 9)
    batch = gather([store], np.array([0, 0]))
    assert {name: array.dtype for name, array in batch.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "segment_ids": np.int32,
        "positions": np.int32,
        "loss_mask": np.float32,
    }
    assert {array.shape for array in batch.values()} == {(2, 9)}


def test_several_stores_are_one_list_and_padding_follows(tmp_path):
    first = _write(tmp_path / "a", [[10] * 7, [11] * 7], 8)
    empty = _write(tmp_path / "none", [], 8)
    second = _write(tmp_path / "b", [[12] * 7], 8)
    assert (len(first), len(empty), len(second)) == (2, 0, 1)
    batch = gather([first, empty, second], np.array([2, 0, 3, 1, 99]))
    assert batch["tokens"][:, 1].tolist() == [12, 10, 0, 11, 0]
    for place in (2, 4):
        for name, array in empty_batch(1, 8).items():
            np.testing.assert_array_equal(batch[name][place], array[0])


def test_same_documents_same_digest_and_other_documents_another(tmp_path):
    documents = _documents(np.random.default_rng(1), 20)
    one = _write(tmp_path / "1", documents, 16)
    same = _write(tmp_path / "2", documents, 16)
    other = _write(tmp_path / "3", [*documents[:-1], [999]], 16)
    longer = _write(tmp_path / "4", documents, 17)
    assert one.digest == same.digest
    assert len({one.digest, other.digest, longer.digest}) == 3


def test_pickles_as_a_path(tmp_path):
    store = _write(tmp_path / "rows", _documents(np.random.default_rng(2), 200), 16)
    data = pickle.dumps(store)
    assert len(data) < 500
    copy = pickle.loads(data)
    index = np.arange(len(store))
    np.testing.assert_array_equal(gather([copy], index)["tokens"], gather([store], index)["tokens"])
