"""Held-out loss: a plain sum over targets, however the text is cut into batches."""

import math

import jax
import numpy as np
import pytest
from training_cases import MODELS, initial_params, ragged_batch

from ml.models import SelfAttention, Transformer
from ml.parallel import MeshConfig, Rules
from ml.train.config import TrainConfig
from ml.train.evaluation import HeldoutLoss, make_evaluate

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCHES = 20  # more than are summed on the device at a time


@pytest.fixture(scope="module")
def case():
    model = MODELS["gemma"]
    rules = Rules.make(MeshConfig())
    # A z-loss is part of the objective, and not of what is reported.
    evaluate = make_evaluate(Transformer(model, place=rules.spec), TrainConfig(z_loss=1.0, loss_chunk=6), rules)
    params = initial_params(model)
    batches = [ragged_batch(8, seed=seed) for seed in range(BATCHES)]
    placed = jax.device_put(params, rules.sharding())
    yield lambda batches, limit=None: _on(rules, evaluate, placed, batches, limit), batches, (model, params)


def _on(rules, evaluate, params, batches, limit):
    with jax.set_mesh(rules.mesh):
        return evaluate(params, batches, limit)


def in_float64(model, params, batches):
    transformer, nats, tokens = Transformer(model), 0.0, 0
    forward = jax.jit(
        lambda p, b: transformer.apply(
            {"params": p}, b["tokens"], SelfAttention(b["segment_ids"], "reference"), b["positions"], method="forward"
        )
    )
    for batch in batches:
        logits = np.asarray(forward(params, batch), np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = np.take_along_axis(log_p, batch["targets"][..., None], -1)[..., 0]
        nats, tokens = nats - (picked * batch["loss_mask"]).sum(), tokens + int(batch["loss_mask"].sum())
    return nats, tokens


def test_the_sum_over_all_targets(case):
    evaluate, batches, (model, params) = case
    nats, tokens = in_float64(model, params, batches)
    got = evaluate(batches)
    assert got.tokens == tokens
    assert got.nats == pytest.approx(nats, rel=1e-5)
    assert got.per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert evaluate(iter(batches)) == got


def test_only_the_first_batches(case):
    evaluate, batches, (model, params) = case
    assert evaluate(batches, 3).tokens == in_float64(model, params, batches[:3])[1]
    assert evaluate(batches, 3).nats == pytest.approx(evaluate(batches[:3]).nats)
    assert evaluate(batches, 17).tokens < evaluate(batches, 100).tokens == evaluate(batches).tokens


def test_it_does_not_depend_on_how_the_rows_are_cut(case):
    evaluate, batches, _ = case
    pairs = zip(batches[::2], batches[1::2], strict=True)
    two_at_a_time = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in pairs]
    padding = {name: np.zeros_like(x) for name, x in batches[0].items()}
    expected = evaluate(batches)
    for other in (two_at_a_time, [*batches, padding]):
        got = evaluate(other)
        assert got.tokens == expected.tokens and got.nats == pytest.approx(expected.nats, rel=1e-6)


def test_bits_per_byte():
    # 100 targets that cost 2 nats each, in a text of 250 bytes.
    loss = HeldoutLoss(nats=200.0, tokens=100)
    assert loss.bits_per_byte(250) == pytest.approx(200 / math.log(2) / 250)
    assert loss.per_token == 2.0
    assert HeldoutLoss(0.0, 0).per_token == 0.0
