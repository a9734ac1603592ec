"""Schedule-free learning (Defazio et al. 2024): averaging takes the place of decay. Wants a constant schedule."""

from typing import Any

import jax
import optax
import optax.contrib

from ml.optim.builder import Inputs
from ml.optim.learning_rate_free import never_zero

PyTree = Any


def schedule_free_adamw(
    inputs: Inputs, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_power: float = 2.0
) -> optax.GradientTransformation:
    """AdamW without momentum, under schedule-free averaging.

    Args:
      inputs: the shared setting; warm up, then stay constant.
      b1: share of the average in the point where gradients are taken; must be positive.
      b2, eps: Adam's second moment.
      weight_power: an iterate's weight in the average is the largest rate so far to this power.
    """
    base = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.scale_by_learning_rate(inputs.schedule),
    )
    return _averaged(base, inputs, b1, weight_power)


def schedule_free_sgd(inputs: Inputs, *, b1: float = 0.9, weight_power: float = 2.0) -> optax.GradientTransformation:
    """Gradient descent under schedule-free averaging; options as for `schedule_free_adamw`."""
    base = optax.chain(
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.scale_by_learning_rate(inputs.schedule),
    )
    return _averaged(base, inputs, b1, weight_power)


def _averaged(
    base: optax.GradientTransformation, inputs: Inputs, b1: float, weight_power: float
) -> optax.GradientTransformation:
    # optax counts steps from 1 here and from 0 in the base; the average must weigh a step by the rate it was taken at.
    rate = never_zero(lambda count: inputs.schedule(count - 1))
    return optax.contrib.schedule_free(base, rate, b1, weight_power)


def averaged_params(opt_state: PyTree, params: PyTree) -> PyTree:
    """The average that schedule-free learning evaluates, wherever its state lies inside ``opt_state``."""
    is_state = lambda node: isinstance(node, optax.contrib.ScheduleFreeState)  # noqa: E731
    (state,) = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
    return optax.contrib.schedule_free_eval_params(state, params)
