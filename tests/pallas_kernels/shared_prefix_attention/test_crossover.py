"""When to share: the model, its fit, and the file that remembers it."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from pallas_kernels.shared_prefix_attention import Crossover, Shapes, crossover, make_plan
from pallas_kernels.shared_prefix_attention import crossover as module_function
from pallas_kernels.shared_prefix_attention.crossover import _fit, calibrate

SHAPES = Shapes(4, 2, 16, 8, "float32", "float32", "reference")
MODEL = Crossover(own=1.0, token=3.0, pair=0.25, row=2.0, fixed=100.0)


def _table(rows, shared, page=8):
    pages = shared // page
    table = np.concatenate([np.tile(np.arange(pages), (rows, 1)), 1000 + np.arange(rows)[:, None]], axis=1)
    return table.astype(np.int32), np.full(rows, shared + 3, np.int32)


@pytest.mark.parametrize(
    ("rows", "shared", "pays"),
    [
        (4, 1024, False),  # 4 * 0.75 rows' worth of tokens saved, 3 spent: nothing gained
        (5, 1024, True),
        (64, 8, True),
        (5, 64, False),  # a node worth having, in a call that is too short to pay for the merge
    ],
)
def test_shares_where_the_model_says_so(rows, shared, pays):
    plan = make_plan(*_table(rows, shared), page_size=8, crossover=MODEL)
    assert plan.levels == (1 if pays else 0)
    if not pays:
        assert not plan.starts.any()


def test_gains_add_up_over_nodes():
    table, lengths = _table(8, 64)
    alone = make_plan(table, lengths, page_size=8, crossover=Crossover(1.0, 3.0, 0.25, 2.0, 200.0))
    both = np.concatenate([table, np.where(table < 1000, table + 500, table + 50)])
    together = make_plan(both, np.tile(lengths, 2), page_size=8, crossover=Crossover(1.0, 3.0, 0.25, 2.0, 200.0))
    assert (alone.levels, together.levels) == (0, 1)


def test_fit_finds_the_coefficients():
    rng = np.random.default_rng(0)
    features = [(t, n * t, n, 1.0) for n in (4, 16, 64) for t in (256, 1024, 4096)]
    true = np.array([2e-7, 3e-9, 1e-6, 5e-5])
    samples = [(x, float(np.dot(x, true) * rng.uniform(0.99, 1.01))) for x in features]
    np.testing.assert_allclose(_fit(samples), true, rtol=0.2)


def test_fit_has_no_negative_coefficients():
    samples = [((x, 1.0), 2.0 * x - 0.1) for x in (1.0, 2.0, 3.0)]
    slope, constant = _fit(samples)
    assert constant == 0.0 and 1.8 < slope < 2.0


def test_measures_and_remembers(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "crossover.json"
    grid = ((2, 16), (4, 32), (8, 64))
    first = crossover(SHAPES, path=path, grid=grid)
    assert all(0 <= seconds < 60 for seconds in dataclasses.astuple(first))
    (entry,) = json.loads(path.read_text()).items()
    assert '"heads": 4' in entry[0]
    module = sys.modules[module_function.__module__]
    monkeypatch.setattr(module, "calibrate", lambda *a, **k: pytest.fail("measured again"))
    assert crossover(SHAPES, path=path) == first


def test_an_unreadable_file_is_measured_again(tmp_path):
    path = tmp_path / "crossover.json"
    path.write_text("{ half")
    crossover(SHAPES, path=path, grid=((2, 16), (4, 32)))
    assert len(json.loads(path.read_text())) == 1


def test_other_shapes_do_not_replace_what_is_known(tmp_path, monkeypatch):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps({"other": {"own": 1}}))
    crossover(SHAPES, path=path, grid=((2, 16), (4, 32)))
    assert set(json.loads(path.read_text())) > {"other"}


def test_calibrates_a_quantized_cache():
    shapes = Shapes(4, 2, 16, 8, "bfloat16", "int8", "reference")
    measured = calibrate(shapes, grid=((2, 16), (4, 32)), repeats=1)
    assert all(0 <= seconds < 60 for seconds in dataclasses.astuple(measured))


@pytest.mark.parametrize("implementation", ["gpu", "tpu"])
def test_an_interpreted_kernel_is_not_measured(tmp_path, implementation):
    shapes = dataclasses.replace(SHAPES, implementation=implementation)
    with pytest.raises(ValueError, match=r"is interpreted on cpu.*Crossover.always"):
        crossover(shapes, path=tmp_path / "crossover.json")
    assert not any(tmp_path.iterdir())
