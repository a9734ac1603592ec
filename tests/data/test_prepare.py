"""From files to packed rows: what is held out, what is counted, what is reused, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from ml.config import to_dict
from ml.data.config import DataConfig, SourceConfig, TokenizerConfig
from ml.data.prepare import prepare
from ml.data.rows import gather
from ml.data.sources import Source, is_heldout
from ml.errors import UserError

prepare_module = sys.modules["ml.data.prepare"]


def _corpus(path, count=80, start=0):
    words = ["alpha", "beta", "gamma", "délta", "ε", "return", "import"]
    rng = np.random.default_rng(start)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            text = f"{start + i}: " + " ".join(rng.choice(words, size=int(rng.integers(1, 60))))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def _config(path, **changes):
    settings = {
        "sources": (SourceConfig(kind="jsonl", path=str(path)),),
        "tokenizer": TokenizerConfig(vocab_size=300),
        "sequence_length": 32,
        "heldout_fraction": 0.2,
    }
    return DataConfig(**{**settings, **changes})


def _all_rows(store):
    return gather([store], np.arange(len(store)))


def _texts(prepared, store):
    """Decodes every document of a store that fits in one segment of a row."""
    batch = _all_rows(store)
    texts = []
    for row in range(len(store)):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            ids = batch["tokens"][row][batch["segment_ids"][row] == segment]
            texts.append(prepared.tokenizer.decode(ids))
    return texts


def test_every_document_is_on_exactly_one_side(tmp_path):
    path = _corpus(tmp_path / "a.jsonl")
    prepared = prepare(_config(path, sequence_length=2048), tmp_path)
    texts = [document.text for document in Source(SourceConfig(kind="jsonl", path=str(path))).documents()]
    heldout = [text for text in texts if is_heldout(text, 0.2)]
    (source,) = prepared.sources
    assert 4 <= len(heldout) <= 30
    assert sorted(_texts(prepared, source.heldout)) == sorted(heldout)
    assert sorted(_texts(prepared, source.train)) == sorted(set(texts) - set(heldout))
    assert prepared.heldout_text().decode() == "".join(heldout)
    assert prepared.heldout_bytes == len("".join(heldout).encode())


def test_order_of_documents_does_not_move_the_held_out_ones(tmp_path):
    path = _corpus(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(reversed(lines)))
    one = prepare(_config(path), tmp_path / "1")
    two = prepare(_config(tmp_path / "b.jsonl"), tmp_path / "2")
    assert one.heldout_bytes == two.heldout_bytes
    assert one.heldout_text() != two.heldout_text()


def test_the_targets_of_a_pass_spell_every_byte_of_the_held_out_text_once(tmp_path):
    prepared = prepare(_config(_corpus(tmp_path / "a.jsonl"), sequence_length=16), tmp_path)
    (source,) = prepared.sources
    batch = _all_rows(source.heldout)
    targets = batch["targets"][batch["loss_mask"] > 0]
    text_targets = targets[targets != prepared.tokenizer.eos_id]
    # In a byte-level vocabulary a token's name has one character for each byte that it stands for.
    vocabulary = {i: name for name, i in json.loads(prepared.tokenizer._model.to_str())["model"]["vocab"].items()}
    assert sum(len(vocabulary[int(token)]) for token in text_targets) == prepared.heldout_bytes
    assert (targets == prepared.tokenizer.eos_id).sum() == source.heldout.documents
    assert batch["tokens"].max() > prepared.tokenizer.eos_id


def test_second_start_reads_nothing(tmp_path, monkeypatch):
    config = _config(_corpus(tmp_path / "a.jsonl"))
    first = prepare(config, tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("read again")

    monkeypatch.setattr(Source, "documents", refuse)
    second = prepare(config, tmp_path)
    assert second.sources[0].train.digest == first.sources[0].train.digest
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint


@pytest.mark.parametrize("change", ["file", "length", "vocabulary", "heldout"])
def test_a_change_is_noticed(tmp_path, change):
    path = _corpus(tmp_path / "a.jsonl")
    first = prepare(_config(path), tmp_path)
    changes = {
        "file": {},
        "length": {"sequence_length": 33},
        "vocabulary": {"tokenizer": TokenizerConfig(vocab_size=270)},
        "heldout": {"heldout_fraction": 0.3},
    }[change]
    if change == "file":
        _corpus(path, start=1000)
    second = prepare(_config(path, **changes), tmp_path)
    assert second.sources[0].train.digest != first.sources[0].train.digest


def test_another_source_in_the_mixture_reuses_the_first_with_a_fixed_tokenizer(tmp_path, monkeypatch):
    a, b = _corpus(tmp_path / "a.jsonl"), _corpus(tmp_path / "b.jsonl", start=500)
    one = prepare(_config(a), tmp_path)
    one.tokenizer.save(tmp_path / "tokenizer")
    fixed = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    prepare(_config(a, tokenizer=fixed), tmp_path)
    folders = set((tmp_path / "data").glob("rows-*"))
    sources = (SourceConfig(kind="jsonl", path=str(a)), SourceConfig(kind="jsonl", path=str(b), weight=2.0))
    both = prepare(_config(a, sources=sources, tokenizer=fixed), tmp_path)
    assert len({p for p in (tmp_path / "data").glob("rows-*") if p.is_dir()} - folders) == 1
    assert [source.weight for source in both.sources] == [1.0, 2.0]
    assert both.train_rows == sum(len(source.train) for source in both.sources)
    assert both.heldout_bytes == len(both.heldout_text())


def test_the_tokenizer_never_sees_held_out_text(tmp_path, monkeypatch):
    config = _config(_corpus(tmp_path / "a.jsonl"), heldout_fraction=0.5)
    seen = list(prepare_module._sample(config, [Source(config.sources[0])]))
    assert seen and not any(is_heldout(text, 0.5) for text in seen)


def test_the_tokenizer_sample_is_bounded_and_shared_by_weight(tmp_path):
    a, b = _corpus(tmp_path / "a.jsonl", 300), _corpus(tmp_path / "b.jsonl", 300, start=1000)
    sources = (SourceConfig(kind="jsonl", path=str(a), weight=3.0), SourceConfig(kind="jsonl", path=str(b)))
    config = _config(a, sources=sources, tokenizer=TokenizerConfig(vocab_size=300, sample_bytes=8000))
    seen = list(prepare_module._sample(config, [Source(source) for source in config.sources]))
    from_a = sum(len(text.encode()) for text in seen if int(text.split(":")[0]) < 1000)
    total = sum(len(text.encode()) for text in seen)
    assert total <= 8000 + 500 and abs(from_a / total - 0.75) < 0.08


@pytest.mark.parametrize("pieces", [100, 10**9])
def test_very_long_documents_are_cut_for_the_tokenizer_without_losing_a_character(tmp_path, monkeypatch, pieces):
    monkeypatch.setattr(prepare_module, "_PIECE_CHARACTERS", pieces)
    text = "".join(f"line {i} {'x' * (i % 150)}\n" for i in range(100)) + "y" * 350
    assert "".join(prepare_module._pieces(text)) == text
    assert max(map(len, prepare_module._pieces(text))) <= pieces
    (tmp_path / "a.txt").write_text(text)
    config = _config(tmp_path, sources=(SourceConfig(kind="text", path=str(tmp_path)),), heldout_fraction=0.0)
    prepared = prepare(config, tmp_path)
    tokens = np.fromfile(next((tmp_path / "data").glob("rows-*/train/tokens.bin")), np.uint16)
    assert prepared.tokenizer.decode(tokens.tolist()) == text
    assert prepared.heldout_rows == 0


_KILLED = """
import json, os, signal, sys
from ml.config import build
from ml.data.config import DataConfig
from ml.data.rows import RowWriter
from ml.data.prepare import prepare

add, count = RowWriter.add, 0
def die(self, *args):
    global count
    add(self, *args)
    count += 1
    if count == int(sys.argv[3]):
        for file in self._files._files.values():
            file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
RowWriter.add = die
prepare(build(DataConfig, json.loads(sys.argv[1])), sys.argv[2])
"""


def test_kill_while_packing_then_start_again(tmp_path):
    config = _config(_corpus(tmp_path / "a.jsonl"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [json.dumps(to_dict(config)), str(tmp_path / "killed"), "40"]
    result = subprocess.run([sys.executable, "-c", _KILLED, *arguments], env=environment)
    assert result.returncode == -signal.SIGKILL
    assert list((tmp_path / "killed" / "data").glob("rows-*.partial-*"))
    again, fresh = prepare(config, tmp_path / "killed"), prepare(config, tmp_path / "fresh")
    assert again.sources[0].train.digest == fresh.sources[0].train.digest
    assert again.sources[0].heldout.digest == fresh.sources[0].heldout.digest
    assert not list((tmp_path / "killed" / "data").glob("*.partial-*"))


def test_errors_leave_no_rows_behind(tmp_path):
    path = _corpus(tmp_path / "a.jsonl")
    with open(path, "a") as file:
        file.write('{"text": "cut')
    with pytest.raises(UserError, match=r"a\.jsonl:81: not valid JSON"):
        prepare(_config(path), tmp_path)
    assert not [p for p in (tmp_path / "data").iterdir() if not p.name.endswith(".lock")]


def test_empty_corpora_are_refused(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text('\n{"text": ""}\n')
    with pytest.raises(UserError, match=r"data\.sources\[0\]: no text in the 1 file\(s\) of .*empty\.jsonl"):
        prepare(_config(empty), tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"data\.sources\[0\]\.path: no \.jsonl"):
        prepare(_config(tmp_path / "none"), tmp_path)
    path = _corpus(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=r"heldout_fraction=1e-09 holds out none of 3 documents"):
        prepare(_config(path, heldout_fraction=1e-9), tmp_path)
    with pytest.raises(UserError, match=r"all 3 documents of .* are held out"):
        prepare(_config(path, heldout_fraction=1 - 1e-9), tmp_path)


def test_a_remote_cache_is_refused(tmp_path):
    path = _corpus(tmp_path / "a.jsonl", 3)
    with pytest.raises(UserError, match=r"data\.cache_dir: .* local disk"):
        prepare(_config(path), "gs://bucket/run")
    prepare(_config(path, cache_dir=str(tmp_path / "cache"), heldout_fraction=0.0), "gs://bucket/run")
    assert list((tmp_path / "cache").glob("rows-*"))
