"""The chunked loss: against NumPy in float64, and its gradients against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from ml.parallel import MeshConfig, Rules
from ml.train.loss import chunked_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")
BATCH, LENGTH, EMBED, VOCAB = 4, 12, 8, 32
CHUNKS = (0, 1, 5, 100)  # 0: all at once; 5 does not divide; 100 is longer than the row


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    head = {"kernel": rng.normal(size=(EMBED, VOCAB)).astype(np.float32)}
    hidden = rng.normal(size=(BATCH, LENGTH, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    mask = (rng.random((BATCH, LENGTH)) < 0.6).astype(np.float32)
    mask[1] = 0.0  # a row, and with it a chunk, in which nothing counts
    return head, hidden, targets, mask


def logits_of(head, hidden):
    return jnp.einsum("ble,ev->blv", hidden, head["kernel"])


def in_float64(head, hidden, targets, mask, z_loss):
    logits = hidden.astype(np.float64) @ head["kernel"].astype(np.float64)
    top = logits.max(-1, keepdims=True)
    log_z = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    at_target = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    cross_entropy = ((log_z - at_target) * mask).sum()
    return cross_entropy + z_loss * (log_z**2 * mask).sum(), cross_entropy


def plain(head, hidden, targets, mask, z_loss):
    """As a textbook has it; JAX derives the gradient."""
    logits = logits_of(head, hidden)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    log_z = jnp.log(jnp.exp(logits).sum(-1))
    return -(picked * mask).sum() + z_loss * (log_z**2 * mask).sum()


@pytest.mark.sweep("0.0-5", "0.1-1", "0.0-100")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_equals_float64(case, chunk, z_loss):
    expected = in_float64(*case, z_loss)
    got = chunked_loss(logits_of, *case, z_loss, chunk)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.sweep("0.0-1", "0.1-5")
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_gradients_equal_plain_autodiff(case, chunk, z_loss):
    head, hidden, targets, mask = case
    # The factor stands for whatever comes after the loss: it must reach the gradients.
    expected = jax.grad(lambda a, b: 3.0 * plain(a, b, targets, mask, z_loss), (0, 1))(head, hidden)
    got = jax.jit(jax.grad(lambda a, b: 3.0 * chunked_loss(logits_of, a, b, targets, mask, z_loss, chunk)[0], (0, 1)))(
        head, hidden
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    assert np.all(np.asarray(got[1])[mask == 0] == 0), "a position that does not count has a gradient"


def test_the_reported_cross_entropy_has_no_gradient(case):
    head, hidden, targets, mask = case
    gradient = jax.grad(lambda h: chunked_loss(logits_of, head, h, targets, mask, 0.1, 4)[1])(hidden)
    assert not np.any(gradient)


def sizes(jaxpr):
    """Numbers of elements of all that is computed, also within loops."""
    for equation in jaxpr.eqns:
        yield from (np.prod(variable.aval.shape) for variable in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_nothing_as_large_as_all_logits_is_ever_made(case):
    head, hidden, targets, mask = case
    step = jax.grad(lambda a, b: chunked_loss(logits_of, a, b, targets, mask, 0.1, 3)[0], (0, 1))
    largest = max(sizes(jax.make_jaxpr(step)(head, hidden).jaxpr))
    assert BATCH * 3 * VOCAB <= largest < BATCH * LENGTH * VOCAB


def test_the_program_does_not_grow_with_the_number_of_chunks(case):
    head, hidden, targets, mask = case

    def operations(chunk):
        step = jax.grad(lambda a, b: chunked_loss(logits_of, a, b, targets, mask, 0.1, chunk)[0], (0, 1))
        return len(list(sizes(jax.make_jaxpr(step)(head, hidden).jaxpr)))

    assert operations(1) == operations(3) == operations(5)


def test_bfloat16_hidden_states_are_summed_in_float32(case):
    head, hidden, targets, mask = case
    many = np.tile(hidden, (64, 1, 1)).astype(jnp.bfloat16)
    got = chunked_loss(logits_of, head, many, np.tile(targets, (64, 1)), np.tile(mask, (64, 1)), 0.0, 4)
    expected = in_float64(head, hidden.astype(jnp.bfloat16), targets, mask, 0.0)
    assert got[0].dtype == jnp.float32
    np.testing.assert_allclose(got[0], 64 * expected[0], rtol=2e-3)


@pytest.mark.sweep("2x2x2-5", "sequence4-0")
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(4, 1, 2),
        MeshConfig(2, 2, 2),
        MeshConfig(2, tensor=2, sequence=2),
        MeshConfig(1, tensor=2, sequence=4),
    ],
    ids=["4x1x2", "2x2x2", "sequence2", "sequence4"],
)
def test_vocabulary_and_length_cut_over_devices(case, chunk, mesh):
    """Four shards of 12 positions have 3 each, of which a chunk of 5 takes one each."""
    head, hidden, targets, mask = case
    rules = Rules.make(mesh)

    def sharded_logits(head, hidden):
        place = rules.spec("batch", "length", "vocab")
        return jnp.einsum("ble,ev->blv", hidden, head["kernel"], out_sharding=place)

    @jax.jit
    def loss_and_gradients(head, hidden, targets, mask):
        def objective(head, hidden):
            return chunked_loss(sharded_logits, head, hidden, targets, mask, 0.1, chunk)

        return jax.value_and_grad(objective, (0, 1), has_aux=True)(head, hidden)

    with jax.set_mesh(rules.mesh):
        rows = [jax.device_put(x, rules.sharding("batch", "length")) for x in (targets, mask)]
        kernel = jax.device_put(head["kernel"], rules.sharding("embed", "vocab"))
        assert kernel.sharding.shard_shape(kernel.shape)[1] == VOCAB // 2
        placed = jax.device_put(hidden, rules.sharding("batch", "length", None))
        (objective, cross_entropy), gradients = loss_and_gradients({"kernel": kernel}, placed, *rows)
    np.testing.assert_allclose((objective, cross_entropy), in_float64(*case, 0.1), rtol=1e-6)
    expected = jax.grad(lambda a, b: plain(a, b, targets, mask, 0.1), (0, 1))(head, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradients, expected)
