"""Every kind of source: what it yields, and the one line it says when the input is wrong."""

import gzip
import itertools
import json
import os
import random
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python import array_record_module

from ml.config import build
from ml.data.config import DataConfig, SourceConfig
from ml.data.sources import Source, is_heldout, stable_hash
from ml.errors import UserError


def _texts(kind, path, **settings):
    return [document.text for document in Source(SourceConfig(kind=kind, path=str(path), **settings)).documents()]


def _error(kind, path, **settings):
    with pytest.raises(UserError) as caught:
        _texts(kind, path, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def _write_array_record(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


# --- Python source


def test_standard_library_is_read_without_its_tests_and_packages():
    source = Source(SourceConfig())
    names = [file.name for file in source.files]
    assert "argparse.py" in names and "json/decoder.py" in names
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
    document = next(d for d in source.documents() if d.key == "argparse.py")
    assert "class ArgumentParser" in document.text


def test_python_files_are_decoded_as_the_interpreter_does(tmp_path, caplog):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\r\n".encode("latin-1"))
    (tmp_path / "bom.py").write_bytes(b"\xef\xbb\xbfx = 1\n")
    (tmp_path / "bad.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not Python")
    for hidden in (".git", "__pycache__", "site-packages"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.py").write_text("hidden")
    documents = [(d.key, d.text) for d in Source(SourceConfig(path=str(tmp_path))).documents()]
    assert documents == [("bom.py", "x = 1\n"), ("package/latin.py", "# -*- coding: latin-1 -*-\nname = 'é'\n")]
    assert len([r for r in caplog.records if "skipped" in r.getMessage()]) == 2


# --- text


def test_text_directory_glob_and_single_file(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "deep" / "er" / "a.md").write_text("ay")
    (tmp_path / "c.log").write_text("see\r\n")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("dee – zipped".encode()))
    (tmp_path / "empty.txt").write_text("")
    assert _texts("text", tmp_path) == ["bee", "dee – zipped", "ay"]
    assert _texts("text", tmp_path / "c.log") == ["see\r\n"], "bytes are kept as they are"
    assert _texts("text", f"{tmp_path}/*.log") == ["see\r\n"]
    assert _texts("text", f"{tmp_path}/**/*.md") == ["ay"]


def test_text_split_into_paragraphs_and_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n  \n\nthree\n\nfour", encoding="utf-8-sig")
    assert _texts("text", path, split_by="paragraph") == ["one\ntwo", "three", "four"]
    assert _texts("text", path, split_by="line") == ["one", "two", "  ", "three", "four"]


def test_linked_files_are_files_and_linked_directories_are_not_entered(tmp_path):
    blobs, corpus = tmp_path / "blobs", tmp_path / "corpus"
    blobs.mkdir()
    corpus.mkdir()
    (blobs / "0").write_text("linked")
    (corpus / "a.txt").symlink_to(blobs / "0")
    (corpus / "loop.txt").symlink_to(corpus)
    times = itertools.count(1)
    for path in (corpus, f"{corpus}/*.txt", corpus / "a.txt", corpus / "loop.txt"):
        assert _texts("text", path) == ["linked"]
        before = Source(SourceConfig(kind="text", path=str(path))).fingerprint
        os.utime(blobs / "0", ns=(1, next(times) * 10**9))
        assert Source(SourceConfig(kind="text", path=str(path))).fingerprint != before, "the target's time counts"


def test_a_name_with_brackets_is_a_name(tmp_path):
    (tmp_path / "a[1].txt").write_text("bracket")
    assert _texts("text", tmp_path / "a[1].txt") == ["bracket"]


def test_text_errors(tmp_path):
    (tmp_path / "corpus.txt").write_bytes(b"fine\nbad \xff\n")
    assert "corpus.txt:2: not UTF-8" in _error("text", tmp_path / "corpus.txt")
    assert "corpus.txt:2: not UTF-8" in _error("text", tmp_path / "corpus.txt", split_by="line")
    message = _error("text", tmp_path / "corpsu.txt")
    assert message.startswith("data.sources[0].path: ") and "did you mean 'corpus.txt'?" in message
    assert "neither does the directory" in _error("text", tmp_path / "no" / "where.txt")
    assert "no file matches" in _error("text", f"{tmp_path}/*.nothing")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.csv").write_text("1,2")
    assert "no .txt, .md" in _error("text", tmp_path / "sub")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(os.urandom(1000))[:-20])
    assert "cut.txt.gz: cannot be read" in _error("text", tmp_path / "cut.txt.gz")
    (tmp_path / "not.gz").write_bytes(b"plain")
    assert "not.gz: cannot be read" in _error("text", tmp_path / "not.gz")


# --- JSONL


def test_jsonl_plain_and_compressed(tmp_path):
    lines = '{"text": "one", "id": 1}\n\n{"text": "zwei \\u00e4"}\r\n{"text": ""}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "drei"}'))
    assert _texts("jsonl", tmp_path) == ["one", "zwei ä", "drei"]
    (tmp_path / "c.json").write_text('{"body": "x"}')
    assert _texts("jsonl", tmp_path / "c.json", text_field="body") == ["x"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "cut', "a.jsonl:2: not valid JSON"),
        (b"[" * 100_000, "a.jsonl:2: not valid JSON"),
        (b'["text"]', "a.jsonl:2: a JSON list, not an object"),
        (b'{"txt": "x", "id": 1}', "a.jsonl:2: no key 'text' (data.sources[0].text_field); did you mean 'txt'?"),
        (b"{}", "a.jsonl:2: no key 'text' (data.sources[0].text_field); the object is empty"),
        (b'{"text": 3}', "a.jsonl:2: 'text' holds int, not a string"),
        (b'{"text": null}', "a.jsonl:2: 'text' holds NoneType, not a string"),
        (b'{"text": "\\ud800"}', "a.jsonl:2: 'text' holds half of a surrogate pair"),
        (b'{"text": "\xff"}', "a.jsonl:2: not UTF-8"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    assert says in _error("jsonl", tmp_path / "a.jsonl")


# --- Parquet


def test_parquet_streams_row_groups(tmp_path):
    texts = [f"document {i} ü" for i in range(50)]
    pq.write_table(pa.table({"id": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    pq.write_table(pa.table({"text": pa.array(["x", None, "", "y"], pa.large_string())}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"text": pa.array(["z", "z"]).dictionary_encode()}), tmp_path / "c.parquet")
    assert _texts("parquet", tmp_path) == [*texts, "x", "y", "z", "z"]


def test_parquet_errors(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), path)
    assert "data.sources[0].text_field: " in _error("parquet", path)
    assert "has no column 'contents'; did you mean 'content'?" in _error("parquet", path, text_field="contents")
    assert "column 'id' of" in _error("parquet", path, text_field="id")
    path.write_bytes(path.read_bytes()[:-30])
    assert "a.parquet: not a whole Parquet file" in _error("parquet", path, text_field="content")


# --- ArrayRecord


def test_array_record_text_and_json(tmp_path):
    texts = [f"record {i} ß" for i in range(600)]
    _write_array_record(tmp_path / "a.array_record", [text.encode() for text in texts])
    assert _texts("array_record", tmp_path, text_field="") == texts
    _write_array_record(tmp_path / "j.array_record", [json.dumps({"body": t}).encode() for t in texts[:3]])
    assert _texts("array_record", tmp_path / "j.array_record", text_field="body") == texts[:3]


def test_array_record_errors(tmp_path):
    path = tmp_path / "a.array_record"
    _write_array_record(path, [b'{"text": "x"}', b"plain", b"\xff"])
    assert "a.array_record: record 1: not valid JSON" in _error("array_record", path)
    assert "data.sources[0].text_field=''" in _error("array_record", path)
    assert "a.array_record: record 2 is not UTF-8" in _error("array_record", path, text_field="")
    _write_array_record(path, [random.Random(i).randbytes(2500).hex().encode() for i in range(40)])
    damaged = bytearray(path.read_bytes())
    damaged[100_000] ^= 255
    path.write_bytes(damaged)
    assert "a.array_record: cannot be read as ArrayRecord" in _error("array_record", path, text_field="")
    path.write_bytes(path.read_bytes()[:70_000])
    assert "not an ArrayRecord file, or cut short" in _error("array_record", path)
    path.write_bytes(b"something else")
    assert "not an ArrayRecord file, or cut short" in _error("array_record", path)


# --- remote stores: the in-memory filesystem stands for a bucket


@pytest.fixture
def bucket():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    if filesystem.exists("/bucket"):
        filesystem.rm("/bucket", recursive=True)


def test_every_kind_reads_from_a_remote_store(bucket, tmp_path):
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "a.parquet")
    _write_array_record(tmp_path / "a.array_record", [b'{"text": "record"}'])
    for name, content in {
        "a.txt": b"text",
        "deep/b.jsonl.gz": gzip.compress(b'{"text": "json"}'),
        "a.parquet": (tmp_path / "a.parquet").read_bytes(),
        "a.array_record": (tmp_path / "a.array_record").read_bytes(),
        "m.py": b"python",
    }.items():
        bucket.pipe(f"/bucket/{name}", content)
    url = "memory://bucket"
    assert _texts("text", url) == ["text"]
    assert _texts("jsonl", f"{url}/deep/*.gz") == ["json"]
    assert _texts("jsonl", url) == ["json"]
    assert _texts("parquet", f"{url}/a.parquet") == ["parquet"]
    assert _texts("array_record", f"{url}/a.array_record") == ["record"]
    assert [(d.key, d.text) for d in Source(SourceConfig(path=url)).documents()] == [("m.py", "python")]
    assert "does not exist; did you mean 'a.txt'?" in _error("text", f"{url}/b.txt")


def test_missing_driver_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed, whether it is or not
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "gs", raising=False)
    assert "run `pip install gcsfs`" in _error("jsonl", "gs://bucket/a.jsonl")
    assert "cannot be opened" in _error("jsonl", "gss://bucket/a.jsonl")


# --- identity


def test_fingerprint_changes_with_content_and_settings(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")

    def fingerprint(**settings):
        return Source(SourceConfig(kind="text", path=str(path), **settings)).fingerprint

    before = fingerprint()
    assert before == fingerprint() == fingerprint(weight=2.0)
    assert before != fingerprint(split_by="line")
    path.write_text("two")
    os.utime(path, ns=(1, 1))
    assert before != fingerprint()


def test_hash_is_fixed_and_independent_of_the_hash_seed():
    assert stable_hash("os.py") == 0xF19DB6A54FEDE009
    assert stable_hash("\ud800") != stable_hash("\ud801"), "a file name may hold what UTF-8 does not"
    code = "from ml.data.sources import stable_hash; print(stable_hash('os.py'))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert int(result.stdout) == stable_hash("os.py")


def test_heldout_share_is_right_and_grows_with_the_fraction():
    keys = [f"document {i}" for i in range(20_000)]
    small = {key for key in keys if is_heldout(key, 0.05)}
    large = {key for key in keys if is_heldout(key, 0.2)}
    assert small < large
    assert abs(len(small) / len(keys) - 0.05) < 0.006 and abs(len(large) / len(keys) - 0.2) < 0.012
    assert not any(is_heldout(key, 0.0) for key in keys)


# --- configuration


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sources": [{"kind": "json"}]}, r"data\.sources\[0\]\.kind: 'json' is not one of .*did you mean 'jsonl'"),
        ({"sources": [{"kind": "jsonl"}]}, r"data\.sources\[0\]: path is empty"),
        ({"sources": [{"weight": 0}]}, r"data\.sources\[0\]: weight=0.0 must be positive"),
        ({"sources": [{"kind": "jsonl", "path": "x", "text_field": ""}]}, r"text_field is empty"),
        ({"sources": []}, r"data: sources is empty"),
        ({"sequence_length": 1}, r"sequence_length=1"),
        ({"heldout_fraction": 1.0}, r"heldout_fraction=1.0"),
        ({"num_workers": -1}, r"num_workers=-1"),
        ({"tokenizer": {"vocab_size": 100}}, r"data\.tokenizer: vocab_size=100"),
        ({"tokenizer": {"sample_bytes": 0}}, r"data\.tokenizer: sample_bytes=0"),
        ({"sequence_lenght": 8}, r"data\.sequence_lenght: no such key; did you mean 'sequence_length'"),
    ],
)
def test_configuration_refuses_what_makes_no_sense(values, says):
    with pytest.raises(UserError, match=says):
        build(DataConfig, values, path="data")
