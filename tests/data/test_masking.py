"""Pairs of sentences and masks: what the paper asks for, and that they follow from the number of a record alone."""

import pickle

import numpy as np
import pytest

from ml.data.config import MaskedConfig
from ml.data.masking import PairReader, choose, corrupted, truncated
from ml.data.sentences import SentenceStore, SentenceWriter, spans_of

LENGTH, VOCAB = 24, 400
IDS = {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
REGULAR = np.arange(4, VOCAB)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Documents whose sentences tell where they are from: each token is 10 * document + sentence, modulo the rest."""
    folder = tmp_path_factory.mktemp("data") / "store"
    writer = SentenceWriter(folder, sequence_length=LENGTH, vocab_size=VOCAB)
    rng = np.random.default_rng(0)
    for document in range(38):
        sizes = rng.integers(1, 9, rng.integers(3, 9))
        sentences = [([10 + 10 * document + s] * n, [True, *(rng.random(n - 1) < 0.5)]) for s, n in enumerate(sizes)]
        writer.add(sentences, 100)
    described = writer.finish()
    made = SentenceStore(folder)
    assert described["documents"] == made.documents == 38 and len(made) == described["rows"] > 38
    return made


def reader(store, seed=5, **settings):
    return PairReader([store], MaskedConfig(**{"max_predictions": 3, **settings}), IDS, REGULAR, seed)


def restored(batch, row):
    """The tokens of a row as they were, and the two sentences."""
    tokens = batch["tokens"][row].copy()
    counted = batch["loss_mask"][row] > 0
    tokens[batch["masked_positions"][row][counted]] = batch["targets"][row][counted]
    ends = np.flatnonzero(tokens == IDS["sep"])
    return tokens, tokens[1 : ends[0]], tokens[ends[0] + 1 : ends[1]]


def test_rows_are_what_the_paper_says(store):
    batch = reader(store, short_fraction=0.3)(np.arange(8 * len(store)))
    random = batch["next_sentence"][:, 0].astype(bool)
    assert 0.4 < random.mean() < 0.65 and batch["row_mask"].all()
    for row in range(len(random)):
        tokens, a, b = restored(batch, row)
        size = len(a) + len(b) + 3
        assert tokens[0] == IDS["cls"] and len(a) and len(b) and (tokens[size:] == IDS["pad"]).all()
        np.testing.assert_array_equal(batch["segment_ids"][row], np.arange(LENGTH) < size)
        second = (np.arange(LENGTH) >= len(a) + 2) & (np.arange(LENGTH) < size)
        np.testing.assert_array_equal(batch["token_types"][row], second)
        document = a[0] // 10
        assert (a // 10 == document).all() and ((b // 10 == document).all() != random[row])
        if not random[row]:
            assert b[0] >= a[-1], "what comes after, or the rest of a sentence that was cut"
        count = int(batch["loss_mask"][row].sum())
        positions = batch["masked_positions"][row][:count]
        assert count == min(3, max(1, round(0.15 * size))) and (np.diff(positions) > 0).all()
        assert not set(tokens[positions]) & set(IDS.values()), "special tokens are not predicted"


def test_a_record_is_drawn_anew_in_each_epoch_and_the_same_each_time(store):
    rows, records = np.arange(64), len(store)
    first, again = reader(store)(rows), pickle.loads(pickle.dumps(reader(store)))(rows[::-1])
    later, other = reader(store)(rows + records), reader(store, seed=6)(rows)
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name][::-1])
    for changed in (later, other):
        assert (changed["masked_positions"] != first["masked_positions"]).any(axis=1).mean() > 0.8
        # Of the same record: A begins where it began, but for rows that were cut short.
        begins = [restored(batch, row)[1][0] for batch in (first, changed) for row in range(64)]
        assert np.mean(np.array(begins[:64]) == begins[64:]) > 0.7


def test_without_a_seed_numbers_beyond_the_last_are_padding(store):
    batch = reader(store, seed=None)(np.array([len(store) - 1, len(store)]))
    assert batch["row_mask"].tolist() == [[1.0], [0.0]] and (batch["tokens"][1] == IDS["pad"]).all()
    assert not any(batch[name][1].any() for name in ("segment_ids", "loss_mask", "next_sentence"))


def test_random_sentences_are_as_long_as_true_ones(store):
    """Or their length would tell the label."""
    batch = reader(store, short_fraction=0.0)(np.arange(40 * len(store)))
    random, sizes = batch["next_sentence"][:, 0], batch["token_types"].sum(axis=1)
    assert abs(sizes[random == 1].mean() / sizes[random == 0].mean() - 1) < 0.1


def test_whole_words_are_masked_together():
    words = np.array([1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 0], bool)
    word_of = np.cumsum(words)
    seen = set()
    for seed in range(40):
        chosen = choose(words, 4, True, np.random.default_rng(seed))
        assert 0 < len(chosen) <= 4
        for word in set(word_of[chosen]):
            assert set(np.flatnonzero(word_of == word)) <= set(chosen.tolist())
        seen |= set(chosen.tolist())
        assert len(choose(words, 4, False, np.random.default_rng(seed))) == 4
    assert seen == set(range(11))


def test_of_the_predicted_80_percent_are_masked_and_10_are_random():
    tokens = np.full(20_000, 7)
    after = corrupted(tokens, IDS["mask"], REGULAR, np.random.default_rng(0))
    assert np.mean(after == IDS["mask"]) == pytest.approx(0.8, abs=0.01)
    assert np.mean(after == 7) == pytest.approx(0.1, abs=0.01)
    others = after[(after != 7) & (after != IDS["mask"])]
    assert set(others) <= set(REGULAR) and len(set(others)) > 390


@pytest.mark.parametrize(("a", "b", "room"), [(9, 3, 6), (3, 9, 6), (5, 5, 10), (4, 4, 3), (1, 9, 2)])
def test_the_longer_sentence_is_cut_first(a, b, room):
    pair = [(np.arange(n), np.arange(n) % 2 == 0) for n in (a, b)]
    (x, x_words), (y, y_words) = truncated(*pair, room, np.random.default_rng(0))
    assert len(x) + len(y) == min(room, a + b) and len(x_words) == len(x)
    if a + b > room:
        assert min(len(x), len(y)) == min(a, b, room // 2)
    assert x_words[0] and y_words[0] and (np.diff(x) == 1).all()
    drawn = [truncated(*pair, room, np.random.default_rng(seed)) for seed in range(20)]
    begins = {int(first[0][0]) for first, _ in drawn} | {int(second[0][0]) for _, second in drawn}
    assert (len(begins) > 1) == (a + b > room), "from the front or the back by chance"


def test_records_fill_rows_and_leave_no_sentence_alone():
    assert spans_of(np.array([4, 4, 4]), 8) == [(0, 2), (2, 3)]
    assert spans_of(np.array([2, 2, 2, 8]), 8) == [(0, 3), (3, 4)], "both would not fit"
    assert spans_of(np.array([2, 2, 2, 3]), 8) == [(0, 2), (2, 4)]
    assert spans_of(np.array([5]), 8) == [(0, 1)]
