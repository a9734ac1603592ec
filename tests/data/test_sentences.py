"""Sentences on disk: what went in comes out, and the pipeline's order goes on where it stopped."""

import json

import numpy as np
import pytest

from ml.data import DataConfig, MaskedConfig, SourceConfig, TokenizerConfig, heldout_batches, make_loader, prepare
from ml.data.sentences import SentenceStore, SentenceWriter
from ml.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda"]


def test_what_is_written_is_read(tmp_path):
    writer = SentenceWriter(tmp_path / "store", sequence_length=11, vocab_size=100)
    writer.add([([5, 6, 7], [True, False, True]), (range(10, 20), [True] + [False] * 9)], 30)
    writer.add([([8], [True])], 1)
    writer.finish()
    store = SentenceStore(tmp_path / "store")
    assert (store.documents, store.bytes, store.targets, store.sequence_length) == (2, 31, 14, 11)
    # 8 tokens fit, so a sentence is cut into halves of 4: 3 + 4 | 4 + 2, and the other document.
    assert [store.span(row) for row in range(len(store))] == [(0, 2, 4), (2, 4, 4), (4, 5, 5)]
    tokens, words = store.read(0, 4)
    assert tokens.tolist() == [5, 6, 7, *range(10, 20)]
    assert np.flatnonzero(words).tolist() == [0, 2, 3, 7, 11], "a piece begins a word"
    assert store.size(1, 3) == 8 and store.fitting(0, 4, 10) == 2 and store.fitting(0, 4, 11) == 3


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    with open(folder / "corpus.jsonl", "w") as file:
        for _ in range(80):
            sentences = (" ".join(rng.choice(WORDS, rng.integers(2, 9))) + "." for _ in range(rng.integers(2, 9)))
            file.write(json.dumps({"text": " ".join(s.capitalize() for s in sentences)}) + "\n")
    source = SourceConfig(kind="jsonl", path=str(folder / "corpus.jsonl"))
    config = DataConfig((source,), TokenizerConfig(vocab_size=300), 32, heldout_fraction=0.2, masked=MaskedConfig())
    return prepare(config, folder)


def test_the_loader_goes_on_where_it_stopped_and_epochs_differ(prepared):
    def loader():
        return make_loader(prepared, global_batch_size=8, seed=1, microbatches=2)

    whole, resumed = loader(), loader()
    batches = [next(whole) for _ in range(4 * prepared.train_rows // 8)]
    for _ in range(3):
        next(resumed)
    state = json.loads(json.dumps(resumed.get_state()))
    fresh = loader()
    fresh.set_state(state)
    for expected in batches[3:6]:
        got = next(fresh)
        for name, array in expected.items():
            np.testing.assert_array_equal(got[name], array)
    rows = [tuple(row) for batch in batches for row in np.concatenate([batch["tokens"], batch["masked_positions"]], 1)]
    assert len(set(rows)) == len(rows), "no row comes twice, though each record came four times"
    halves = [make_loader(prepared, global_batch_size=8, seed=1, shard_index=i, shard_count=2) for i in range(2)]
    both = [next(half)["tokens"] for half in halves]
    np.testing.assert_array_equal(np.concatenate(both), batches[0]["tokens"])
    for one in (whole, resumed, fresh, *halves):
        one.close()


def test_the_held_out_pass_is_the_same_each_time_and_whatever_the_batch(prepared):
    def everything(size):
        batches = list(heldout_batches(prepared, global_batch_size=size))
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}

    first, again, other = everything(8), everything(8), everything(6)
    assert first["row_mask"].sum() == prepared.heldout_rows < len(first["row_mask"])
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        np.testing.assert_array_equal(first[name][: prepared.heldout_rows], other[name][: prepared.heldout_rows])


def test_the_trained_tokenizer_frames_pairs(prepared):
    tokenizer = prepared.tokenizer
    assert tokenizer.encoder_ids() == {"pad": 0, "cls": 1, "sep": 2, "mask": 3}
    ids, words = tokenizer.encode_words(["alpha beta"])[0]
    assert tokenizer.decode(ids) == "alpha beta" and words[0] and sum(words) == 2
    assert tokenizer.special_ids() == {0, 1, 2, 3}
    assert not {0, 1, 2, 3} & set(tokenizer.encode("[MASK] [SEP]")), "text that spells them is text"


def test_a_decoders_tokenizer_is_refused(tmp_path, prepared):
    from ml.data import Tokenizer

    Tokenizer.train(["alpha beta"], 300).save(tmp_path)
    source = prepared.config.sources
    config = DataConfig(source, TokenizerConfig(path=str(tmp_path)), 32, masked=MaskedConfig())
    with pytest.raises(UserError, match=r"has no \[PAD\] token"):
        prepare(config, tmp_path)
