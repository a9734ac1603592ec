"""Tuning tables: which entry is found, what a malformed one says, and what is written."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuning
from pallas_kernels.tuning import Entry, TableError, merged, overlay, read, tuned, tuned_config, write
from pallas_kernels.tuning.table import bucketed

CHIP = "NVIDIA H200"
VERSIONS = {"jax": "0.11.2"}


def entry(config, chip=CHIP, dtype="bfloat16", versions=VERSIONS, op="op", seconds=1e-3, **shape):
    return Entry(op, chip, dtype, shape, config, seconds, versions)


def found(entries, *, chip=CHIP, dtype="bfloat16", op="op", **shape):
    with overlay(entries):
        config = tuned(op, chip, dtype, **shape)
    return config and config["choice"]


def test_nothing_is_known_without_a_table():
    assert tuned("no_such_kernel", CHIP, jnp.bfloat16, length=8) is None
    assert tuned("op", None, jnp.bfloat16) is None


def test_the_key():
    entries = [entry({"choice": 1}, length=1024, head_dim=128)]
    assert found(entries, length=1024, head_dim=128) == 1
    assert found(entries, length=1024, head_dim=128, dtype=jnp.bfloat16) == 1
    assert found(entries, length=1024, head_dim=128, dtype="float32") is None
    assert found(entries, length=1024, head_dim=128, chip="TPU v5e") is None
    assert found(entries, length=1024, head_dim=128, op="other") is None
    assert found(entries, length=1024) is None, "what an entry names must be known"
    assert found(entries, length=1024, head_dim=128, more=7) == 1, "what it does not name does not matter"


def test_sizes_fall_into_the_bucket_below_and_no_further_than_a_quarter():
    entries = [entry({"choice": n}, length=n) for n in (256, 1024)]
    expected = {255: None, 256: 256, 511: 256, 1023: 256, 1024: 1024, 4096: 1024, 8191: 1024, 8192: None}
    assert {n: found(entries, length=n) for n in expected} == expected
    assert found([entry({"choice": 0}, length=700)], length=600) == 0, "both are in the bucket of 512"


def test_the_sizes_that_layouts_depend_on_and_words_must_be_equal():
    entries = [entry({"choice": 1}, head_dim=64, kv="int8", causal=True)]
    assert found(entries, head_dim=64, kv="int8", causal=True) == 1
    assert found(entries, head_dim=96, kv="int8", causal=True) is None
    assert found(entries, head_dim=64, kv="int4", causal=True) is None
    assert found(entries, head_dim=64, kv="int8", causal=False) is None
    assert found(entries, head_dim=64, kv="int8", causal=1) is None


def test_the_entry_that_says_most_then_the_nearest_then_this_version():
    general, far, near = (
        entry({"choice": "general"}, head_dim=64),
        entry({"choice": "far"}, head_dim=64, length=256, batch=4),
        entry({"choice": "near"}, head_dim=64, length=512, batch=4),
    )
    asked = {"head_dim": 64, "length": 700, "batch": 5}
    for order in ([general, far, near], [near, far, general]):
        assert found(order, **asked) == "near"
        assert found(order, **asked | {"length": 100}) == "general"
    old = entry({"choice": "old"}, versions={"jax": "0.1.0"}, length=8)
    new = entry({"choice": "new"}, versions={"jax": jax.__version__}, length=8)
    assert found([old, new], length=8) == found([new, old], length=8) == "new"


def test_two_names_of_one_chip():
    assert found([entry({"choice": 1}, chip="TPU v5e")], chip="TPU v5 lite") == 1
    assert found([entry({"choice": 1}, chip="TPU v5 lite")], chip="TPU v5e") == 1


def test_overlays_nest_and_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.shipped.cache_clear()
    write(tmp_path / "op.json", "op", [entry({"choice": "shipped"}, length=8)])
    assert tuned("op", CHIP, "bfloat16", length=8) == {"choice": "shipped"}
    own = tmp_path / "own.json"
    write(own, "op", [entry({"choice": "own"}, length=8)])
    with overlay(own):
        assert tuned("op", CHIP, "bfloat16", length=8) == {"choice": "own"}
        with overlay([entry({"choice": "inner"}, seconds=None)]):
            assert tuned("op", CHIP, "bfloat16", length=8) == {"choice": "inner"}
        with pytest.raises(ZeroDivisionError), overlay([]):
            raise ZeroDivisionError
        assert tuned("op", CHIP, "bfloat16", length=8) == {"choice": "own"}
    assert tuned("op", CHIP, "bfloat16", length=8) == {"choice": "shipped"}
    tuning.shipped.cache_clear()


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = 8

    def __post_init__(self):
        if self.block % 8:
            raise ValueError(f"block={self.block} must be a multiple of 8")


def test_a_configuration_that_is_none_names_its_entry():
    with overlay([entry({"block": 16})]):
        assert tuned_config(Config, "op", CHIP, "bfloat16") == Config(16)
        assert tuned_config(Config, "other", CHIP, "bfloat16") is None
    for config, message in (({"block": 3}, "multiple of 8"), ({"blok": 8}, "blok")):
        with overlay([entry(config)]), pytest.raises(TableError, match=f"an overlay: config: .*{message}"):
            tuned_config(Config, "op", CHIP, "bfloat16")


GOOD = {"chip": CHIP, "dtype": "bfloat16", "shape": {"n": 8}, "config": {}, "seconds": 1.0, "versions": VERSIONS}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ([], "must be an object with the keys 'op' and 'entries'"),
        ({"op": "op", "entries": {}}, "'entries' a list"),
        ({"op": "op", "entries": [GOOD, []]}, "entry 1: must be an object with the keys chip, config"),
        ({"op": "op", "entries": [GOOD | {"time": 3}]}, "entry 0: must be an object with the keys"),
        ({"op": "op", "entries": [GOOD | {"shape": [8]}]}, r"entry 0: shape must be an object, not \[8\]"),
        ({"op": "op", "entries": [GOOD | {"shape": {"n": -8}}]}, "entry 0: shape.n must be a size or a word, not -8"),
        ({"op": "op", "entries": [GOOD | {"shape": {"n": 1.5}}]}, "entry 0: shape.n must be a size"),
        ({"op": "op", "entries": [GOOD | {"seconds": None}]}, "entry 0: seconds must be a positive number, not None"),
        ({"op": "op", "entries": [GOOD | {"seconds": float("nan")}]}, "entry 0: seconds must be"),
        ({"op": "op", "entries": [GOOD | {"versions": {}}]}, "entry 0: versions must name that of jax"),
        ({"op": "op", "entries": [GOOD, GOOD | {"shape": {"n": 9}}]}, "entry 1: the same chip, .* as entry 0"),
    ],
)
def test_malformed_tables_name_the_file_and_the_entry(tmp_path, document, message):
    path = tmp_path / "op.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(TableError, match=f"{path}: .*{message}|{path}: {message}"):
        read(path)


def test_what_is_written_is_read_and_newer_measurements_replace_older(tmp_path):
    path = tmp_path / "new" / "op.json"
    old = [entry({"choice": 1}, length=1000), entry({"choice": 2}, length=2000)]
    write(path, "op", old)
    again = read(path)
    assert [e.shape for e in again] == [{"length": 512}, {"length": 1024}]
    better = merged(again, [entry({"choice": 3}, length=1100)])
    assert {bucketed(e.shape)["length"]: e.config["choice"] for e in better} == {512: 1, 1024: 3}
    assert len(merged(again, [entry({"choice": 3}, versions={"jax": "9"}, length=1100)])) == 3
    assert list(tmp_path.rglob("*.tmp")) == []


def test_buckets():
    shape = {"length": 1000, "batch": 1, "none": 0, "head_dim": 96, "page_size": 48, "kind": "int8", "causal": True}
    assert bucketed(shape) == shape | {"length": 512, "none": 1}


def test_shipped_tables_are_well_formed_and_named_after_their_kernel():
    for path in tuning.FOLDER.glob("*.json"):
        assert {e.op for e in read(path)} <= {path.stem}
