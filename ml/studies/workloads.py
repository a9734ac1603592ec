"""Small supervised problems of different kinds, and whole trainings on them as one program each."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ml.errors import UserError
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.byte_text import VOCAB_SIZE, byte_rows

_CONTEXT = 8  # bytes that the language model sees
_HELDOUT = 0.25
Examples = tuple[Array, Array]


@dataclasses.dataclass(frozen=True)
class Workload:
    """A problem.

    Attributes:
      name: in tables.
      model: of the inputs, with an output for each target or class.
      classes: whether targets are classes (cross-entropy) or values (squared error, of a target of variance 1).
      train, heldout: inputs and targets.
      batch_size: examples in a step, drawn with replacement.
    """

    name: str
    model: nn.Module
    classes: bool
    train: Examples
    heldout: Examples
    batch_size: int

    def init(self, key: jax.Array) -> PyTree:
        """Random parameters."""
        return self.model.init(key, self.train[0][:1])["params"]

    def loss(self, params: PyTree, examples: Examples) -> Float[Array, ""]:
        """Mean over ``examples``."""
        inputs, targets = examples
        outputs: Any = self.model.apply({"params": params}, inputs)
        if self.classes:
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()
        return jnp.square(outputs - targets).mean()


class Mlp(nn.Module):
    """Dense layers with GELU between them.

    Attributes:
      widths: of the layers, the output last.
    """

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Float[Array, "examples features"]) -> Float[Array, "examples outputs"]:
        """The last layer is linear."""
        for width in self.widths[:-1]:
            x = nn.gelu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class ByteModel(nn.Module):
    """The next byte from those before it, embedded one by one (Bengio et al. 2003).

    Attributes:
      embed_dim: of a byte.
      width: of the hidden layer.
    """

    embed_dim: int
    width: int

    @nn.compact
    def __call__(self, x: Array) -> Float[Array, "examples bytes"]:
        """``x`` is ``[examples, context]``, whole numbers."""
        embedded = nn.Dense(self.embed_dim, use_bias=False)(jax.nn.one_hot(x, VOCAB_SIZE))
        return Mlp((self.width, VOCAB_SIZE))(embedded.reshape(len(x), -1))


def workloads(byte_examples: int) -> tuple[Workload, ...]:
    """Digits told apart and reconstructed, tumors, diabetes (all of scikit-learn), and a language model of bytes.

    Args:
      byte_examples: how many the language model has to train on.

    Raises:
      UserError: scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError("scikit-learn is missing; run `pip install scikit-learn`") from error
    digits, tumors, diabetes = datasets.load_digits(), datasets.load_breast_cancer(), datasets.load_diabetes()
    pixels = digits.data / 16
    rows, heldout = byte_rows(byte_examples, 1024, _CONTEXT)
    return (
        Workload("digits", Mlp((64, 64, 10)), True, *_split(pixels, digits.target), 64),
        Workload("digits, reconstructed", Mlp((64, 8, 64, 64)), False, *_split(pixels, _standard(pixels)), 64),
        Workload("tumors", Mlp((32, 2)), True, *_split(_standard(tumors.data), tumors.target), 32),
        Workload("diabetes", Mlp((32, 1)), False, *_split(diabetes.data * 20, _standard(diabetes.target[:, None])), 32),
        Workload("bytes", ByteModel(16, 128), True, _next_byte(rows), _next_byte(heldout), 64),
    )


def make_training(
    workload: Workload, optimizer: OptimizerConfig, schedule: ScheduleConfig, *, steps: int, every: int
) -> Callable[[Sequence[int]], Float[np.ndarray, "seeds evaluations"]]:
    """Returns ``seeds -> held-out loss`` after each ``every`` of the ``steps``; infinite where it is no number.

    Args:
      workload: what to train.
      optimizer, schedule: as everywhere.
      steps: in all, a multiple of ``every``.
      every: steps from one evaluation to the next.
    """
    axes = jax.tree.map(lambda x: ("",) * x.ndim, jax.eval_shape(workload.init, jax.random.key(0)))
    tx, _ = make_optimizer(optimizer, schedule, total_steps=steps, batch_size=workload.batch_size, axes=axes)

    def step(carry: tuple[PyTree, PyTree], key: jax.Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, opt_state = carry
        rows = jax.random.randint(key, (workload.batch_size,), 0, len(workload.train[0]))
        grads = jax.grad(workload.loss)(params, (workload.train[0][rows], workload.train[1][rows]))
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    def stretch(carry: tuple[PyTree, PyTree], keys: jax.Array) -> tuple[tuple[PyTree, PyTree], Any]:
        carry, _ = jax.lax.scan(step, carry, keys)
        loss = workload.loss(carry[0], workload.heldout)
        return carry, jnp.where(jnp.isfinite(loss), loss, jnp.inf)

    @jax.jit
    @jax.vmap
    def train(seed: Array) -> Float[Array, " evaluations"]:
        first, order = jax.random.split(jax.random.key(seed))
        params = workload.init(first)
        keys = jax.random.split(order, (steps // every, every))
        return jax.lax.scan(stretch, (params, tx.init(params)), keys)[1]

    return lambda seeds: np.asarray(train(jnp.asarray(seeds, jnp.uint32)))


def _split(inputs: np.ndarray, targets: np.ndarray) -> tuple[Examples, Examples]:
    """The same split everywhere; so many are held out."""
    order = np.random.default_rng(0).permutation(len(inputs))
    targets = targets.astype(np.int32 if targets.ndim == 1 else np.float32)
    cut = int(_HELDOUT * len(inputs))
    take = functools.partial(_examples, inputs.astype(np.float32), targets)
    return take(order[cut:]), take(order[:cut])


def _examples(inputs: np.ndarray, targets: np.ndarray, rows: np.ndarray) -> Examples:
    return jnp.asarray(inputs[rows]), jnp.asarray(targets[rows])


def _next_byte(rows: np.ndarray) -> Examples:
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, -1])


def _standard(x: np.ndarray) -> np.ndarray:
    """Of mean 0 and variance 1 in each column; columns that do not vary become 0."""
    spread = x.std(axis=0)
    return (x - x.mean(axis=0)) / np.where(spread == 0, 1.0, spread)
