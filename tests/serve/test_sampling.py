import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ml.serve.sampling import Constraints, Penalties, SamplingParams, SamplingRows, _keep, logprobs, sample

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))


def _draws(params, logits=LOGITS, count=4000):
    """Relative frequency of each token over ``count`` draws of one request."""
    rows = SamplingRows.of([params] * count)
    tokens = jax.jit(sample)(jnp.tile(logits, (count, 1)), rows, jnp.arange(count))
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


def _renormalized(kept, temperature=1.0):
    p = np.zeros(5)
    p[kept] = np.exp(LOGITS[kept] / temperature)
    return p / p.sum()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, _renormalized([0, 1, 2, 3, 4])),
        ({"temperature": 0.5}, _renormalized([0, 1, 2, 3, 4], 0.5)),
        ({"temperature": 3.0}, _renormalized([0, 1, 2, 3, 4], 3.0)),
        ({"top_k": 2}, _renormalized([1, 3])),
        ({"top_k": 99}, _renormalized([0, 1, 2, 3, 4])),
        # 0.4 + 0.25 < 0.7: the third is needed to reach it.
        ({"top_p": 0.7}, _renormalized([1, 3, 4])),
        ({"top_p": 0.6}, _renormalized([1, 3])),
        ({"top_p": 0.01}, _renormalized([1])),
        # 0.2 / 0.4 = 0.5 stays, 0.1 / 0.4 = 0.25 does not.
        ({"min_p": 0.45}, _renormalized([1, 3, 4])),
        ({"min_p": 1.0}, _renormalized([1])),
        # Of the three that top_k leaves, the first two hold 0.65 / 0.85 = 76%.
        ({"top_k": 3, "top_p": 0.75}, _renormalized([1, 3])),
        # The temperature comes first: at 0.5 the two likeliest hold 81%.
        ({"temperature": 0.5, "top_p": 0.75}, _renormalized([1, 3], 0.5)),
    ],
)
def test_distribution(params, expected):
    frequency = _draws(SamplingParams(**params))
    assert not frequency[expected == 0].any()
    np.testing.assert_allclose(frequency, expected, atol=0.035)


def test_greedy_takes_the_likeliest_and_ignores_the_seed():
    assert _draws(SamplingParams(temperature=0.0, seed=3), count=50)[1] == 1


def test_nearly_zero_temperature_is_greedy_not_nan():
    assert _draws(SamplingParams(temperature=1e-30), LOGITS * 100, count=50)[1] == 1


def test_equal_logits_rank_by_id():
    frequency = _draws(SamplingParams(top_k=2), np.zeros(5, np.float32), count=400)
    assert (frequency > 0).tolist() == [True, True, False, False, False]


def test_top_p_of_one_keeps_the_whole_tail():
    # In float32 the first token's probability is 1 already. A neighbour's top_k sends this row through the filter.
    logits = jnp.array([[0.0] + [-30.0] * 9] * 2)
    keep = _keep(logits, SamplingRows.of([SamplingParams(), SamplingParams(top_k=3)]))
    assert keep.sum(axis=-1).tolist() == [10, 3]


def test_row_depends_on_its_own_seed_and_number_only():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(6, 300)), jnp.float32)
    mine = SamplingParams(seed=11)
    others = [
        SamplingParams(seed=1, top_k=3),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=11, top_p=0.5),
        SamplingParams(seed=2**32 - 1, min_p=0.2),
        SamplingParams(seed=4),
    ]
    numbers = jnp.array([7, 0, 1, 2, 3, 4])
    alone = sample(logits[:1], SamplingRows.of([mine]), numbers[:1])[0]
    assert sample(logits, SamplingRows.of([mine, *others]), numbers)[0] == alone
    greedy = [SamplingParams(temperature=0.0)] * 5
    assert sample(logits, SamplingRows.of([mine, *greedy]), numbers)[0] == alone
    last = sample(logits[::-1], SamplingRows.of([*others[::-1], mine]), numbers[::-1])[5]
    assert last == alone


def test_seed_and_number_both_change_the_draw():
    logits = jnp.zeros((40, 1000))
    seeds = sample(logits, SamplingRows.of([SamplingParams(seed=s) for s in range(40)]), jnp.zeros(40, jnp.int32))
    numbers = sample(logits, SamplingRows.of([SamplingParams()] * 40), jnp.arange(40))
    assert len(set(seeds.tolist())) > 30
    assert len(set(numbers.tolist())) > 30


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"min_tokens": -1},
        {"min_tokens": 129},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"n": 0},
        {"logprobs": 21},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_refuses_parameters_out_of_range(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"^{name}="):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"logit_bias": {-1: 0.0}}, r"logit_bias\[-1\]"),
        ({"logit_bias": {3: 101.0}}, r"logit_bias\[3\]=101"),
        ({"logit_bias": dict.fromkeys(range(301), 0.0)}, "301 entries"),
    ],
)
def test_refuses_biases_and_stops(bad, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**bad)


def _penalties(presence=0.0, frequency=0.0, repetition=1.0, written=(0, 0, 0, 0, 0), seen=(0, 0, 0, 0, 0)):
    rows = [jnp.array([x], jnp.float32) for x in (presence, frequency, repetition)]
    return Penalties(jnp.array([written], jnp.int32), jnp.array([seen], bool) | (jnp.array([written]) > 0), *rows)


@pytest.mark.parametrize(
    ("penalties", "expected"),
    [
        ({}, [1.0, -2.0, 3.0, 0.5, -1.0]),
        ({"presence": 0.5, "written": (2, 0, 1, 0, 0)}, [0.5, -2.0, 2.5, 0.5, -1.0]),
        ({"frequency": 0.5, "written": (2, 0, 1, 0, 0)}, [0.0, -2.0, 2.5, 0.5, -1.0]),
        # The prompt counts for the repetition penalty alone; what is unlikely becomes more so.
        ({"repetition": 2.0, "written": (1, 0, 0, 0, 0), "seen": (0, 1, 0, 0, 0)}, [0.5, -4.0, 3.0, 0.5, -1.0]),
        ({"presence": 1.0, "frequency": 0.25, "repetition": 2.0, "written": (0, 0, 2, 0, 0)}, [1, -2, 0, 0.5, -1]),
    ],
)
def test_penalties(penalties, expected):
    logits = jnp.array([[1.0, -2.0, 3.0, 0.5, -1.0]])
    np.testing.assert_allclose(_penalties(**penalties).apply(logits)[0], expected, atol=1e-6)


def test_penalties_count_what_is_drawn():
    penalties = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), _penalties(presence=1.0))
    once = penalties.after(jnp.array([3, 4]), jnp.array([True, False]))
    after = once.after(jnp.array([3, 1]), jnp.array([True, True]))
    assert after.written.tolist() == [[0, 0, 0, 2, 0], [0, 1, 0, 0, 0]]
    assert after.seen.tolist() == [[False, False, False, True, False], [False, True, False, False, False]]


def test_bias():
    logits = jnp.zeros((2, 40))
    bias_token, bias = jnp.array([[3, 40], [39, 0]]), jnp.array([[1.5, 9.0], [-2.0, -jnp.inf]])
    biased = np.asarray(Constraints(bias_token, bias).apply(logits))
    assert (biased[0, 3], biased[0].sum(), biased[1, 39], biased[1, 0]) == (1.5, 1.5, -2.0, -np.inf)


def test_a_forbidden_token_is_never_drawn():
    logits = np.where(np.arange(5) == 1, -np.inf, LOGITS).astype(np.float32)
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(temperature=0.0)):
        assert _draws(params, logits, count=500)[1] == 0


def test_logprobs_are_those_of_the_model():
    logits = np.random.default_rng(0).normal(size=(3, 11)).astype(np.float32)
    expected = jax.nn.log_softmax(logits)
    got = jax.jit(logprobs, static_argnums=2)(logits, jnp.array([4, 0, 10]), 3)
    order = np.argsort(-logits, axis=-1)
    np.testing.assert_allclose(got.drawn, np.asarray(expected)[range(3), [4, 0, 10]], atol=1e-6)
    np.testing.assert_array_equal(got.top_token, order[:, :3])
    np.testing.assert_allclose(got.top, np.take_along_axis(np.asarray(expected), order[:, :3], -1), atol=1e-6)
    assert got.rank.tolist() == [order[r].tolist().index(t) for r, t in enumerate((4, 0, 10))]
    assert logprobs(logits, jnp.array([0, 0, 0]), 0).top.shape == (3, 0)
