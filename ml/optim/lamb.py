"""LAMB: Adam's direction, rescaled tensor by tensor (You et al. 2020, Algorithm 2)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml.optim.builder import Inputs, MomentDtype
from ml.optim.masks import excluding
from ml.optim.trust_ratio import scale_by_trust_ratio

PyTree = Any


def lamb(
    inputs: Inputs,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    bias_correction: bool = True,
    no_adaptation: tuple[str, ...] | None = None,
    norm_min: float = 0.0,
    norm_max: float | None = None,
    ratio_min: float = 0.0,
    ratio_max: float | None = None,
    mu_dtype: MomentDtype = None,
) -> optax.GradientTransformation:
    """``x -= lr * phi(||x||) / ||u|| * u`` with ``u = m / (sqrt(v) + eps) + weight_decay * x``, per layer and tensor.

    Excluded leaves take a plain Adam step. Decay enters before the norm, so it turns the update but never lengthens it.

    Args:
      inputs: the shared setting.
      b1, b2: decay of the first and second moment.
      eps: added to the root of the second moment.
      bias_correction: divide the moments by ``1 - b**t``. Without it the first steps differ only in how ``eps`` and the
        decay weigh against the direction, since the ratio removes its length.
      no_adaptation: names that are not rescaled; ``None``: those that do not decay.
      norm_min, norm_max, ratio_min, ratio_max: see `scale_by_trust_ratio`.
      mu_dtype: storage type of the first moment.
    """
    adam = optax.scale_by_adam if bias_correction else scale_by_uncorrected_adam
    return optax.chain(
        adam(b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype),
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        scale_by_trust_ratio(
            inputs.axes,
            adapted=inputs.decays if no_adaptation is None else excluding(no_adaptation),
            norm_min=norm_min,
            norm_max=norm_max,
            ratio_min=ratio_min,
            ratio_max=ratio_max,
        ),
        optax.scale_by_learning_rate(inputs.schedule),
    )


def scale_by_uncorrected_adam(
    b1: float, b2: float, eps: float, mu_dtype: MomentDtype = None
) -> optax.GradientTransformation:
    """``m / (sqrt(v) + eps)`` with moments that start at zero and are not corrected for it; optax always corrects."""

    def init(params: PyTree) -> optax.ScaleByAdamState:
        return optax.scale_by_adam(mu_dtype=mu_dtype).init(params)

    def update(
        updates: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * jnp.square(g), updates, state.nu)
        directions = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return directions, optax.ScaleByAdamState(count=optax.safe_increment(state.count), mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)
