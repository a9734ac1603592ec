"""The gradient's noise scale, measured while training: about how large a batch is worth it, in tokens.

Source: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", section 2.2 and appendix A.1:
``B_simple = tr(Sigma) / |G|^2``, the variance of one token's gradient over the square of the true gradient. A batch
well below it gains from being larger as it would from more steps; one well above it gains next to nothing.

Here the small batches are the parts that a step computes anyway: its microbatches and, of gradients that stay partial
sums on each device, every device's part. Parts have unequal numbers of counted tokens, so the paper's comparison of two
batch sizes becomes an analysis of variance: if ``s_i`` is the gradient of one of ``k`` parts, summed over its ``n_i``
tokens, ``T = sum n_i`` and ``A = |sum s_i|^2``, then, without bias and for equal parts as in the paper::

    tr(Sigma) = (sum |s_i|^2 / n_i - A / T) / (k - 1),  |G|^2 = A / T^2 - tr(Sigma) / T.

``Sigma`` is that of whole sequences, spread over their tokens, since parts consist of whole sequences. The loss that
evens out the load of experts is not a mean over tokens; its small share of a gradient is taken as if it were. Tokens
are those that the loss counts: of an encoder in pre-training the masked ones.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, PyTree

from ml.errors import UserError
from ml.parallel import LAYOUTS, Rules
from ml.train.config import TrainConfig
from ml.weights.shards import held_axes

# A group of leaves, by the mesh axes along which its gradient stays apart while microbatches are summed.
Group = tuple[str, ...]

# Of the moving averages. One step's estimate of |G|^2 is mostly noise where the batch is below the noise scale; the
# averages of some twenty steps are not, and the noise scale itself changes more slowly.
_DECAY = 0.95


def check_noise_scale(config: TrainConfig, rules: Rules) -> None:
    """Refuses to measure where a step has no small batches to compare with the large one.

    Raises:
      UserError: says what would give some.
    """
    if not config.noise_scale:
        return
    if rules.mesh.shape["stage"] > 1:
        raise UserError(
            "config.train.noise_scale=true: not measured through a pipeline, whose stages have a microbatch's gradient "
            "at different times; leave it out, or set config.mesh.stage=1"
        )
    layout = LAYOUTS[rules.layout]  # ZeRO-2 sums and cuts gradients at once
    apart = rules.partial_gradient_axes - {"sequence"} if layout.gradients == layout.compute else frozenset()
    if config.microbatches == 1 and not apart:
        raise UserError(
            "config.train.noise_scale=true compares parts of a batch, and here it has only one; set "
            "config.train.microbatches=2 or more"
        )


def no_squares(variables: PyTree) -> dict[Group, Float[Array, ""]]:
    """What `part_squares` adds up from, for gradients by ``variables``."""
    return dict.fromkeys(sorted({_group(x) for x in jax.tree.leaves(variables)}), jnp.zeros((), jnp.float32))


def part_squares(
    variables: PyTree, gradients: PyTree, loss_mask: Float[Array, "rows length"]
) -> dict[Group, Float[Array, ""]]:
    """``sum |s_i|^2 / n_i`` over the parts of one microbatch: a scalar for each group of leaves.

    Where a gradient is a partial sum on every device, nothing but this scalar crosses the network. Along ``sequence``
    it is summed first: parts of one sequence are not independent.

    Args:
      variables: what was differentiated by.
      gradients: of this microbatch, summed over its counted tokens.
      loss_mask: which tokens were counted.
    """
    squares = no_squares(variables)
    for group in squares:
        of_group = [_whole_sequences(g) for v, g in _pairs(variables, gradients) if _group(v) == group]
        squares[group] = _squares_per_token(of_group, loss_mask, group)
    return squares


def estimate(
    squares: Mapping[Group, Float[Array, ""]],
    variables: PyTree,
    gradients: PyTree,
    loss_mask: Float[Array, "microbatches rows length"],
) -> dict[str, Float[Array, ""]]:
    """``tr(Sigma)`` and ``|G|^2`` of one step; the latter may be negative by chance.

    Leaves of which this batch has only one part are left out of both. Not a number: all tokens lie in one part.

    Args:
      squares: of `part_squares`, summed over microbatches.
      variables: what was differentiated by.
      gradients: of the whole batch, summed over its counted tokens and over devices.
      loss_mask: which tokens were counted.
    """
    variance, signal, tokens = jnp.zeros(()), jnp.zeros(()), loss_mask.sum()
    for group, of_parts in squares.items():
        if loss_mask.shape[0] == 1 and not group:
            continue
        whole = sum((_square(g) for v, g in _pairs(variables, gradients) if _group(v) == group), start=jnp.zeros(()))
        own = (of_parts - whole / tokens) / (_parts(loss_mask, group) - 1)
        variance, signal = variance + own, signal + whole / tokens**2 - own / tokens
    return {"noise_variance": variance, "noise_signal": signal}


@dataclasses.dataclass
class SmoothedNoiseScale:
    """Moving averages of numerator and denominator, whose ratio is the noise scale.

    The ratio of averages: the average of ratios would be that of a denominator that may come close to zero.

    Attributes:
      variance, signal: averages of ``tr(Sigma)`` and ``|G|^2``; both start at zero, which their ratio does not show.
    """

    variance: float = 0.0
    signal: float = 0.0

    def update(self, variance: float, signal: float) -> None:
        """Takes in one step; one that is not finite is left out."""
        if math.isfinite(variance) and math.isfinite(signal):
            self.variance = _DECAY * self.variance + (1 - _DECAY) * variance
            self.signal = _DECAY * self.signal + (1 - _DECAY) * signal

    @property
    def tokens(self) -> float | None:
        """The noise scale; ``None``: not known, since the noise drowns the gradient so far."""
        return self.variance / self.signal if self.signal > 0 else None


def _pairs(variables: PyTree, gradients: PyTree) -> list[tuple[jax.Array, jax.Array]]:
    return list(zip(jax.tree.leaves(variables), jax.tree.leaves(gradients), strict=True))


def _group(variable: jax.Array) -> Group:
    """The mesh axes along which the gradient by ``variable`` stays a partial sum of whole sequences."""
    return tuple(sorted(jax.typeof(variable).sharding.spec.reduced - {"sequence"}))


def _whole_sequences(x: jax.Array) -> jax.Array:
    spec = jax.typeof(x).sharding.spec
    if "sequence" not in spec.unreduced:
        return x
    return jax.reshard(x, PartitionSpec(*spec.partitions, unreduced=spec.unreduced - {"sequence"}))


def _square(x: jax.Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _squares_per_token(arrays: list[jax.Array], loss_mask: jax.Array, group: Group) -> Float[Array, ""]:
    """``sum |s_i|^2 / n_i`` over the devices along ``group``; a part without counted tokens has no gradient either."""
    if not group:
        return sum(map(_square, arrays), jnp.zeros(())) / jnp.maximum(loss_mask.sum(), 1)
    others = tuple(sorted(held_axes(loss_mask) - set(group)))
    cuts = [tuple(sorted(held_axes(x))) for x in arrays]

    def local(mask: jax.Array, *shards: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for cut in sorted(set(cuts)):  # what is cut alike is summed alike
            alike = sum((_square(x) for x, own in zip(shards, cuts, strict=True) if own == cut), jnp.zeros(()))
            total += jax.lax.psum(alike, cut) if cut else alike
        return jax.lax.psum(total / jnp.maximum(_counted(mask, others), 1), group)

    return _on_devices(local, loss_mask, *arrays)


def _parts(loss_mask: jax.Array, group: Group) -> Float[Array, ""]:
    """How many parts of a batch have counted tokens."""
    if not group:
        return jnp.sum(loss_mask.sum((1, 2)) > 0, dtype=jnp.float32)
    others = tuple(sorted(held_axes(loss_mask) - set(group)))

    def local(mask: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sum(jax.vmap(_counted, (0, None))(mask, others) > 0, dtype=jnp.float32), group)

    return _on_devices(local, loss_mask)


def _counted(mask: jax.Array, others: tuple[str, ...]) -> Float[Array, ""]:
    """The counted tokens of the part that a device belongs to; it shares them with those along ``others``."""
    return jax.lax.psum(mask.sum(), others) if others else mask.sum()


def _on_devices(local: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """``local`` on each device's shards, partial sums as they are; the result is the same on all."""
    specs = tuple(jax.typeof(x).sharding.spec for x in arrays)
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)(*arrays)
