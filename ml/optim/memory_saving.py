"""Optimizers that keep less than one number per element of the second moment: Adafactor, AdaFactorW and SM3."""

import optax

from ml.optim.auto_sharding import in_auto_axes
from ml.optim.builder import Inputs, MomentDtype
from ml.optim.stacking import per_layer


def adafactor(
    inputs: Inputs,
    *,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    mu_dtype: MomentDtype = None,
    scale_by_parameter: bool = True,
    min_dim_size_to_factor: int = 128,
    eps: float = 1e-30,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern 2018): a second moment factored into rows and columns.

    The factors, the RMS that is clipped and the RMS of the parameter belong to one tensor each; optax's stock version
    would factor and pool over scanned layers. The decay is multiplied by the learning rate (in ``optax.adafactor`` it
    is not).

    Args:
      inputs: the shared setting.
      decay_rate: exponent of the second moment's decay, ``1 - t**-decay_rate``.
      clipping_threshold: largest RMS of an update before the learning rate; ``None``: no clipping.
      momentum: decay of a full-size first moment; ``None``: none is kept.
      mu_dtype: storage type of that moment.
      scale_by_parameter: multiply the update by the parameter's RMS (then learning rates near 1e-2 are usual).
      min_dim_size_to_factor: tensors whose second-largest dimension is smaller keep a full second moment.
      eps: added to the squared gradient.
    """
    steps = [
        optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor, epsilon=eps)
    ]
    if clipping_threshold is not None:
        steps.append(optax.clip_by_block_rms(clipping_threshold))
    if scale_by_parameter:
        steps.append(optax.scale_by_param_block_rms())
    return optax.chain(
        in_auto_axes(per_layer(optax.chain(*steps), inputs.axes)),
        optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype) if momentum is not None else optax.identity(),
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.scale_by_learning_rate(inputs.schedule),
    )


def adafactorw(
    inputs: Inputs,
    *,
    momentum: float = 0.9,
    decay_rate: float = 0.8,
    clipping_threshold: float | None = 1.0,
    mu_dtype: MomentDtype = "bfloat16",
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """AdaFactorW (BASIC, Pham et al. 2021): AdamW's decoupled decay and first moment, Adafactor's factored second one.

    The first moment is stored in 16 bits, so that a matrix needs two bytes of state per element, and rates are AdamW's:
    updates are not multiplied by the parameter's RMS. Microbatches are summed in a buffer of their own (the paper adds
    them into the moments and corrects for it).

    Args:
      inputs: the shared setting.
      momentum, decay_rate, clipping_threshold, mu_dtype, min_dim_size_to_factor: see `adafactor`.
    """
    return adafactor(
        inputs,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        mu_dtype=mu_dtype,
        scale_by_parameter=False,
        min_dim_size_to_factor=min_dim_size_to_factor,
    )


def sm3(inputs: Inputs, *, momentum: float = 0.9, b2: float = 1.0, eps: float = 1e-8) -> optax.GradientTransformation:
    """SM3-II (Anil et al. 2019): one accumulator per row, column, ... of a tensor; covers never span layers.

    Args:
      inputs: the shared setting; the decay is decoupled and multiplied by the learning rate.
      momentum: decay of the averaged step.
      b2: decay of the accumulators; 1 sums, as in AdaGrad.
      eps: added to the accumulator under the root.
    """
    return optax.chain(
        in_auto_axes(per_layer(optax.scale_by_sm3(momentum, b2, eps), inputs.axes)),
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.scale_by_learning_rate(inputs.schedule),
    )
