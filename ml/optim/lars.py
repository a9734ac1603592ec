"""LARS in its two forms: as the LAMB paper analyses it, and as first published in 2017."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ml.optim.builder import Inputs
from ml.optim.masks import Mask, excluding
from ml.optim.stacking import LogicalAxes
from ml.optim.trust_ratio import report_ratio, scale_by_trust_ratio, tensor_norm

PyTree = Any


def lars(
    inputs: Inputs,
    *,
    momentum: float = 0.9,
    no_adaptation: tuple[str, ...] | None = None,
    norm_min: float = 0.0,
    norm_max: float | None = None,
    ratio_min: float = 0.0,
    ratio_max: float | None = None,
) -> optax.GradientTransformation:
    """``x -= lr * phi(||x||) / ||m|| * m`` with ``m = momentum * m + (1 - momentum) * (g + weight_decay * x)``.

    The ratio normalises the momentum (You et al. 2020, Algorithm 1); `lars_2017` normalises the gradient instead.
    Excluded leaves take a plain momentum step.

    Args:
      inputs: the shared setting; the decay is part of the gradient.
      momentum: decay of the averaged gradient.
      no_adaptation: names that are not rescaled; ``None``: those that do not decay.
      norm_min, norm_max, ratio_min, ratio_max: see `scale_by_trust_ratio`.
    """
    return optax.chain(
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.ema(momentum, debias=False),
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


def lars_2017(
    inputs: Inputs,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    no_adaptation: tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """``v = momentum * v + lr * ratio * (g + weight_decay * x); x -= v`` (You, Gitman, Ginsburg 2017, Algorithm 1).

    ``ratio = trust_coefficient * ||x|| / (||g|| + weight_decay * ||x||)``, per layer and tensor.

    Args:
      inputs: the shared setting; the decay is part of the gradient.
      momentum: decay of the accumulated step (its weights sum to ``1 / (1 - momentum)``).
      nesterov: look one step ahead.
      trust_coefficient: how far a layer moves, relative to its norm, per unit of learning rate.
      no_adaptation: names that are not rescaled; ``None``: those that do not decay.
    """
    adapted = inputs.decays if no_adaptation is None else excluding(no_adaptation)
    return optax.chain(
        _decayed_local_rate(inputs, adapted, trust_coefficient),
        optax.scale_by_learning_rate(inputs.schedule),
        optax.trace(momentum, nesterov),
    )


def _decayed_local_rate(inputs: Inputs, adapted: Mask, coefficient: float) -> optax.GradientTransformationExtraArgs:
    table = LogicalAxes(inputs.axes)

    def update(
        updates: PyTree,
        state: optax.EmptyState,
        params: PyTree | None = None,
        *,
        trust_ratios: dict[str, Array] | None = None,
        **_: Any,
    ) -> tuple[PyTree, PyTree]:
        if params is None:
            raise ValueError(optax.NO_PARAMS_MSG)

        def scale(path: tuple[Any, ...], is_adapted: bool, decays: bool, g: Array, x: Array) -> Array:
            decay = inputs.weight_decay if decays else 0.0
            decayed = g + decay * x if decays else g
            if not is_adapted:
                return decayed
            dims = table.within(path, x)
            weight_norm, gradient_norm = tensor_norm(x, dims), tensor_norm(g, dims)
            usable = (weight_norm > 0) & (gradient_norm > 0)
            denominator = jnp.where(usable, gradient_norm + decay * weight_norm, 1)
            ratio = jnp.where(usable, coefficient * weight_norm / denominator, 1)
            report_ratio(trust_ratios, path, ratio, dims)
            return (ratio * decayed).astype(g.dtype)

        masks = adapted(updates), inputs.decays(updates)
        return jax.tree_util.tree_map_with_path(scale, *masks, updates, params), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
