"""Optimizers that find their own step size; the schedule multiplies it, so its usual peak is 1.

D-Adaptation, Prodigy, DoG, DoWG and Mechanic estimate one distance for all parameters together: their norms span the
whole tree by definition, and are the same whether layers are stacked or not. MoMo is absent: its update needs the loss
value besides the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Float

from ml.optim.auto_sharding import in_auto_axes
from ml.optim.builder import Inputs, MomentDtype
from ml.optim.elementwise import adamw
from ml.optim.masks import Mask

PyTree = Any

SMALLEST_RATE = 1e-6


def dadapt_adamw(
    inputs: Inputs, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, initial_estimate: float = 1e-6
) -> optax.GradientTransformation:
    """AdamW by D-Adaptation (Defazio and Mishchenko 2023); ``initial_estimate`` (d0) is to be too small."""
    schedule = never_zero(inputs.schedule)
    transform = optax.contrib.dadapt_adamw(schedule, (b1, b2), eps, initial_estimate)
    return _whole_tree(_with_masked_decay(transform, inputs.weight_decay, inputs.decays, schedule, b1, b2))


def prodigy(
    inputs: Inputs,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    b3: float | None = None,
    eps: float = 1e-8,
    initial_estimate: float = 1e-6,
    estimate_factor: float = 1.0,
    safeguard_warmup: bool = False,
) -> optax.GradientTransformation:
    """Prodigy (Mishchenko and Defazio 2024): D-Adaptation that weighs recent gradients more.

    Args:
      inputs: the shared setting.
      b1, b2: moments of the AdamW inside.
      b3: memory of the distance estimate; ``None``: ``sqrt(b2)``.
      eps: Adam's.
      initial_estimate: first distance d0, to be too small.
      estimate_factor: multiplies the estimate; the one knob that is ever turned.
      safeguard_warmup: keep the schedule out of the estimate's denominator.
    """
    schedule = never_zero(inputs.schedule)
    transform = optax.contrib.prodigy(
        schedule, (b1, b2), b3, eps, initial_estimate, estimate_factor, safeguard_warmup=safeguard_warmup
    )
    return _whole_tree(_with_masked_decay(transform, inputs.weight_decay, inputs.decays, schedule, b1, b2))


def dog(inputs: Inputs, *, initial_distance: float = 1e-6, eps: float = 1e-8) -> optax.GradientTransformation:
    """Distance over gradients (Ivgi et al. 2023): SGD at ``max ||x - x0|| / sqrt(sum ||g||^2)``.

    The first distance is ``initial_distance * (1 + ||x0||)``; the authors evaluate an average of the iterates. The
    decay is part of the gradient.
    """
    return _whole_tree(
        optax.contrib.dog(
            inputs.schedule, ("heuristic", initial_distance), eps, inputs.weight_decay, mask=inputs.decays
        )
    )


def dowg(
    inputs: Inputs, *, initial_squared_distance: float | None = None, eps: float = 1e-4
) -> optax.GradientTransformation:
    """Distance over weighted gradients (Khaled et al. 2023); ``eps`` is also the default first squared distance."""
    return _whole_tree(
        optax.contrib.dowg(inputs.schedule, initial_squared_distance, eps, inputs.weight_decay, mask=inputs.decays)
    )


def mechanic_adamw(
    inputs: Inputs,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mu_dtype: MomentDtype = None,
    initial_scale: float = 1e-6,
    num_betas: int = 6,
    mechanic_decay: float = 1e-2,
) -> optax.GradientTransformation:
    """AdamW whose scale Mechanic learns (Cutkosky et al. 2023).

    Args:
      inputs: the shared setting, for the AdamW inside.
      b1, b2, eps, mu_dtype: of the AdamW inside.
      initial_scale: first scale, to be too small.
      num_betas: how many memories (0.9, 0.99, ...) the scale is learned with.
      mechanic_decay: regularizes the scale, not the parameters.
    """
    base = adamw(inputs, b1=b1, b2=b2, eps=eps, mu_dtype=mu_dtype)
    return _whole_tree(
        optax.contrib.mechanize(base, weight_decay=mechanic_decay, s_init=initial_scale, num_betas=num_betas)
    )


def cocob(inputs: Inputs, *, alpha: float = 100.0, eps: float = 1e-8) -> optax.GradientTransformation:
    """Continuous coin betting (Orabona and Tommasi 2017), element by element.

    The schedule weighs the gradients before they are bet on, and each element's bet is relative to the largest gradient
    it has seen: a decaying schedule fades new gradients out, a constant one of any height changes nothing.
    """
    return _whole_tree(optax.contrib.cocob(inputs.schedule, alpha, eps, inputs.weight_decay, mask=inputs.decays))


def never_zero(schedule: optax.Schedule) -> optax.Schedule:
    """Lifts ``schedule`` to at least 1e-6: at a first rate of exactly 0 D-Adaptation and Prodigy compute 0 / 0."""
    return lambda count: jnp.maximum(schedule(count), SMALLEST_RATE)


def _whole_tree(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Makes the state own its copy of the starting point, and lets inner products over the tree run sharded.

    Without the copy an ``init`` outside of jit puts the parameters' own buffers into the state, and a step that donates
    both is refused.
    """

    def init(params: PyTree) -> PyTree:
        return transform.init(jax.tree.map(jnp.copy, params))

    return in_auto_axes(optax.GradientTransformation(init, transform.update))


def _with_masked_decay(
    transform: optax.GradientTransformation,
    weight_decay: float,
    decays: Mask,
    schedule: optax.Schedule,
    b1: float,
    b2: float,
) -> optax.GradientTransformation:
    """Adds AdamW's decay at the estimated rate, to the leaves in the mask only: optax's versions decay all leaves."""
    if not weight_decay:
        return transform

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, PyTree]:
        steps, new_state = transform.update(updates, state, params)
        rate = state.estim_lr * schedule(state.count) * _bias_correction(new_state.count, b1, b2)
        decay = weight_decay * rate
        steps = jax.tree.map(lambda is_decayed, u, x: u - decay * x if is_decayed else u, decays(params), steps, params)
        return steps, new_state

    return optax.GradientTransformation(transform.init, update)


def _bias_correction(count: Array, b1: float, b2: float) -> Float[Array, ""]:
    return jnp.sqrt(1 - b2**count) / (1 - b1**count)
