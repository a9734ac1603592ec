"""Scaling laws of loss curves: constants recovered from simulated runs, a larger model predicted, and identities."""

import functools

import numpy as np
import pytest
from planned_cases import experiment
from scipy import optimize

from ml.errors import UserError
from ml.plan.loss_curve import NAMES, Curve, LossCurve, critical_batch, fit, read_curve
from ml.plan.step_law import non_embedding_parameters
from ml.train.reporting import MetricsFile
from ml.train.workdir import Workdir

TRUTH = LossCurve(a_n=0.08, n_c=2e13, a_b=0.2, b_0=2e7, a_s=0.65, s_c=2500.0)
SIZES = (1e6, 2e6, 5e6, 1e7, 2e7)
BATCHES = (8e3, 3.2e4, 1.28e5, 5.12e5, 2.048e6)


def loss(n, b, s, law=TRUTH):
    """The trajectory's equation, solved by another's root finder."""

    def excess(level):
        minimal = s / (1 + law.b_0 / level ** (1 / law.a_b) / b)
        return (law.n_c / n) ** law.a_n + (law.s_c / minimal) ** law.a_s - level

    return optimize.brentq(excess, 1e-2, 1e3)


def simulated(noise=0.01, sizes=SIZES, batches=BATCHES):
    rng = np.random.default_rng(0)
    steps = np.geomspace(300, 30_000, 25)
    return [
        Curve(n, b, tuple(steps), tuple(loss(n, b, s) * np.exp(noise * rng.normal()) for s in steps))
        for n in sizes
        for b in batches
    ]


@functools.cache
def fitted():
    return fit(simulated(), bootstrap=30)


def test_the_equation_is_solved():
    steps = [100.0, 1e4, 1e6]
    np.testing.assert_allclose(TRUTH.predict(3e6, 1e5, steps), [loss(3e6, 1e5, s) for s in steps], rtol=1e-9)


def test_known_constants_are_recovered_from_noisy_curves():
    law = fitted()
    for name in ("a_n", "a_b", "a_s"):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=0.08), name
    # Factors in front go with their exponents: what they stand for is well known where runs are.
    assert law.converged(5e6) == pytest.approx(TRUTH.converged(5e6), rel=0.01)
    assert law.critical_batch(3.5) == pytest.approx(TRUTH.critical_batch(3.5), rel=0.1)
    for name in NAMES:
        low, high = law.interval(name, 0.99)
        assert low < getattr(law, name) < high and low < getattr(TRUTH, name) < high, name
    assert law.rms_residual == pytest.approx(0.01, rel=0.1)
    assert [len(part) for part in law.residuals] == [25] * 25


def test_a_model_ten_times_larger_is_predicted_before_it_is_trained():
    steps = np.geomspace(300, 100_000, 20)
    for batch in (3e4, 1e6):
        expected = [loss(2e8, batch, s) for s in steps]
        np.testing.assert_allclose(fitted().predict(2e8, batch, steps), expected, rtol=0.02)
    low, high = fitted().predicted_interval(2e8, 1e6, 1e5, 0.99)
    assert low < loss(2e8, 1e6, 1e5) < high < 1.05 * low


def test_the_fit_does_not_depend_on_the_start_being_near():
    exact = fit(simulated(noise=0.0), bootstrap=0)
    np.testing.assert_allclose(exact.constants, TRUTH.constants, rtol=1e-3)
    with pytest.raises(ValueError, match="fit with bootstrap"):
        exact.interval("a_n")


def test_at_the_critical_batch_both_costs_are_doubled():
    level, n = 4.0, 1e7
    critical = TRUTH.critical_batch(level)
    fewest_steps = TRUTH.steps_to(level, n, 1e15)
    fewest_tokens = TRUTH.steps_to(level, n, 1e-3) * 1e-3
    steps = TRUTH.steps_to(level, n, critical)
    assert steps == pytest.approx(2 * fewest_steps, rel=1e-3)
    assert steps * critical == pytest.approx(2 * fewest_tokens, rel=1e-3)
    assert TRUTH.predict(n, critical, [steps])[0] == pytest.approx(level, rel=1e-9)
    assert TRUTH.steps_to(TRUTH.converged(n), n, critical) == np.inf


def test_a_critical_batch_from_runs_to_one_loss():
    batches = [8, 32, 128, 512, 2048]
    noise = np.exp(0.05 * np.random.default_rng(1).normal(size=5))
    found, fewest = critical_batch(batches, [300 * (1 + 150 / b) * e for b, e in zip(batches, noise, strict=True)])
    assert found == pytest.approx(150, rel=0.15) and fewest == pytest.approx(300, rel=0.1)
    with pytest.raises(ValueError, match="two different batches"):
        critical_batch([8, 8], [100, 100])


@pytest.mark.parametrize(("sizes", "batches"), [((1e6,), BATCHES), (SIZES, BATCHES[:1])])
def test_too_few_curves_are_refused(sizes, batches):
    with pytest.raises(ValueError, match="at least two sizes are needed, and one size at several"):
        fit(simulated(sizes=sizes, batches=batches))


def test_a_curve_is_checked():
    with pytest.raises(ValueError, match="one length"):
        Curve(1e6, 1e3, (1.0, 2.0), (3.0,))
    with pytest.raises(ValueError, match="must be positive"):
        Curve(1e6, 1e3, (0.0,), (3.0,))


def test_a_run_is_read_from_its_folder(tmp_path):
    config = experiment()
    Workdir(tmp_path).claim(config)
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        for step, loss in enumerate((6.0, 5.0, float("nan"), 4.0), 1):
            file.write(step, {"loss": loss, "tokens": 1000 + step})
    curve = read_curve(tmp_path, after_step=1)
    assert (curve.steps, curve.losses, curve.batch_tokens) == ((2.0, 4.0), (5.0, 4.0), 1003)
    assert curve.parameters == non_embedding_parameters(config.model)
    with pytest.raises(UserError, match="no loss after step 4; train longer"):
        read_curve(tmp_path, after_step=4)
    (tmp_path / "experiment.json").unlink()
    with pytest.raises(UserError, match=r"is no folder of a training run: it lacks experiment\.json"):
        read_curve(tmp_path, after_step=1)
