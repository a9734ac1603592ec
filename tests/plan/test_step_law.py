"""Step Law: the published values, the range they hold in, and a fit that finds exponents it was not told."""

import itertools
import math

import jax
import numpy as np
import pytest

from ml.models import MoEConfig, Transformer, TransformerConfig, init_params
from ml.plan import step_law
from ml.plan.step_law import STEP_LAW, Run, fit


@pytest.mark.parametrize(
    ("parameters", "tokens", "rate", "batch"), [(1e9, 1e11, 1.66e-3, 1.11e6), (7e9, 1.4e12, 9.3e-4, 5.0e6)]
)
def test_published_values(parameters, tokens, rate, batch):
    found_rate, found_batch = STEP_LAW.peak_lr.at(parameters, tokens), STEP_LAW.batch_tokens.at(tokens)
    assert found_rate.value == pytest.approx(rate, rel=0.006)
    assert found_batch.value == pytest.approx(batch, rel=0.005)
    # The formulas as the paper prints them, to three digits.
    assert found_rate.value == pytest.approx(1.79 * parameters**-0.713 * tokens**0.307, rel=0.025)
    assert found_batch.value == pytest.approx(0.58 * tokens**0.571, rel=0.006)


def test_the_batch_is_in_tokens():
    assert round(STEP_LAW.batch_tokens.at(1e11).value / 2048) == pytest.approx(541, abs=2)


def test_intervals_widen_away_from_the_runs_as_the_bootstrap_says():
    law = STEP_LAW.batch_tokens
    at_center, beyond = law.at(2e10), law.at(2e12)
    assert at_center.low < at_center.value < at_center.high < 1.15 * at_center.value
    expected = 1.96 * math.hypot(math.log(2) / math.sqrt(12 * 17), 0.019 * math.log(2e12 / 2e10))
    assert math.log(beyond.high / beyond.value) == pytest.approx(expected, rel=1e-3)
    assert math.log(beyond.value / beyond.low) == pytest.approx(expected, rel=1e-3)


def test_what_lies_outside_is_said():
    assert not STEP_LAW.peak_lr.at(1e9, 1e11).outside
    outside = STEP_LAW.peak_lr.at(7e10, 1e9).outside
    assert len(outside) == 2 and "parameters=7e+10 is outside of 2.1e+08 to 1.07e+09" in outside[0]
    with pytest.warns(UserWarning, match="Step Law: tokens=1e\\+13 is outside of"):
        assert step_law.batch_tokens(1e13).value == STEP_LAW.batch_tokens.at(1e13).value
    with pytest.warns(UserWarning, match="learning rate"):
        step_law.peak_lr(1e9, 1e13)
    with pytest.raises(ValueError, match="tokens=0 must be positive"):
        STEP_LAW.batch_tokens.at(0)


SMALL = {"vocab_size": 64, "num_layers": 3, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"position_embedding": "learned"}, {"moe": MoEConfig(4, 2, 8)}]
)
def test_parameters_are_those_of_layers_and_norms(changes):
    config = TransformerConfig(**SMALL, mlp_dim=32, max_length=16, **changes)
    shapes = jax.eval_shape(lambda: init_params(Transformer(config), jax.random.key(0)))
    tables = {"embed", "unembed", "position"} & shapes.keys()
    assert len(tables) >= 1
    kept = [x.size for name, part in shapes.items() if name not in tables for x in jax.tree.leaves(part)]
    assert step_law.non_embedding_parameters(config) == sum(kept)


def surface(n, d, rate, batch, rng):
    """A loss with its minimum where known laws put it: convex in logarithms, with a flat bottom, and noise."""
    best_rate, best_batch = 3.0 * n**-0.6 * d**0.25, 0.9 * d**0.5
    x, y = math.log(rate / best_rate), math.log(batch / best_batch)
    return 2.5 * (1 + 0.01 * x**2 + 0.006 * y**2 - 0.006 * x * y) * math.exp(0.0005 * rng.normal())


def grid(rng, rates=tuple(2.0 ** (k / 2) * 2e-4 for k in range(16))):
    batches = [2.0 ** (k / 2) for k in range(26, 42)]
    sizes = itertools.product((1e8, 3e8, 1e9), (2e9, 1e10, 5e10))
    return [
        Run(n, d, rate, batch, surface(n, d, rate, batch, rng)) for n, d in sizes for rate in rates for batch in batches
    ]


def test_known_exponents_are_recovered_from_a_noisy_grid():
    law = fit(grid(np.random.default_rng(0)), bootstrap=200)
    assert law.peak_lr.exponents == pytest.approx((-0.6, 0.25), abs=0.04)
    assert law.batch_tokens.exponents == pytest.approx((0.5,), abs=0.04)
    assert law.peak_lr.at(1e9, 5e10).value == pytest.approx(3.0 * 1e9**-0.6 * 5e10**0.25, rel=0.1)
    for one, truth in ((law.peak_lr, (-0.6, 0.25)), (law.batch_tokens, (0.5,))):
        for i, exponent in enumerate(truth, 1):
            assert abs(one.exponents[i - 1] - exponent) < 3.5 * math.sqrt(one.covariance[i][i])
    assert law.peak_lr.ranges == ((1e8, 1e9), (2e9, 5e10)) and not law.notes
    assert law.batch_tokens.at(1e12).outside


def test_runs_far_from_the_best_do_not_enter():
    runs = grid(np.random.default_rng(0))
    spoiled = [*runs, Run(1e9, 5e10, 1.0, 1e3, math.inf), Run(1e9, 5e10, 1.0, 1e3, 9.0)]
    assert fit(spoiled, bootstrap=20) == fit(runs, bootstrap=20)


def test_a_best_run_on_the_edge_of_its_grid_is_named():
    runs = grid(np.random.default_rng(0), rates=(1e-4, 2e-4))
    (note, *_) = fit(runs, bootstrap=20).notes
    assert "parameters=1e+08, tokens=2e+09: the best run lies on the grid's edge, in peak_lr" in note


def test_too_few_sizes_are_refused():
    runs = [run for run in grid(np.random.default_rng(0)) if run.parameters == 1e8]
    with pytest.raises(ValueError, match=r"3 cells .* do not tell the exponents apart"):
        fit(runs)
