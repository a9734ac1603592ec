"""Optimizers whose step for an element depends on that element's gradients alone; stacking cannot matter to them."""

import optax

from ml.optim.builder import Inputs, MomentDtype


def adamw(
    inputs: Inputs, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: MomentDtype = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019); the decay is multiplied by the learning rate."""
    return optax.adamw(
        inputs.schedule, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=inputs.weight_decay, mask=inputs.decays
    )


def nadamw(
    inputs: Inputs, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, mu_dtype: MomentDtype = None
) -> optax.GradientTransformation:
    """AdamW with Nesterov's look-ahead in the first moment (Dozat 2016)."""
    return optax.nadamw(
        inputs.schedule, b1, b2, eps, mu_dtype=mu_dtype, weight_decay=inputs.weight_decay, mask=inputs.decays
    )


def sgd(inputs: Inputs, *, momentum: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """Stochastic gradient descent with heavy-ball momentum; the decay is part of the gradient (L2 regularization)."""
    return optax.chain(
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.sgd(inputs.schedule, momentum or None, nesterov),
    )


def lion(
    inputs: Inputs, *, b1: float = 0.9, b2: float = 0.99, mu_dtype: MomentDtype = None
) -> optax.GradientTransformation:
    """Lion: the sign of an interpolated momentum (Chen et al. 2023). Wants a 3-10x lower rate than AdamW."""
    return optax.lion(inputs.schedule, b1, b2, mu_dtype=mu_dtype, weight_decay=inputs.weight_decay, mask=inputs.decays)
