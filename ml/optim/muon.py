"""Muon: momentum made orthogonal, for the matrices inside the blocks; Adam for everything else."""

from typing import Any

import jax
import optax
import optax.contrib

from ml.models.parameters import STACKED, matrix_axes
from ml.optim.auto_sharding import in_auto_axes
from ml.optim.builder import Inputs, MomentDtype
from ml.optim.masks import EXCLUDED, path_names

PyTree = Any

LOOKUP_AXES = frozenset({"vocab", "position", "expert_logits"})
"""A tensor with one of these is a table or a classifier over a discrete set (embeddings, unembedding, routers)."""


def muon(
    inputs: Inputs,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    eps: float = 1e-8,
    consistent_rms: float | None = 0.2,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_factor: float = 1.0,
    mu_dtype: MomentDtype = None,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) with the scaling of Liu et al. 2025, which lets both groups share one learning rate.

    Attention kernels are matrices between the residual stream and all heads together; each layer's and each expert's
    matrix is orthogonalized by itself (`matrix_dimensions`). The decay is decoupled, by name, for both groups.

    Args:
      inputs: the shared setting.
      momentum: decay of the averaged gradient.
      nesterov: look one step ahead, in both groups.
      ns_steps: Newton-Schulz iterations.
      eps: numerical floor, in both groups.
      consistent_rms: RMS of an orthogonalized update; ``None``: ``sqrt(max(1, fan_out / fan_in))`` times orthogonal.
      adam_b1, adam_b2: moments of the Adam group.
      adam_factor: the Adam group's learning rate relative to Muon's.
      mu_dtype: storage type of first moments.
    """
    # A rate of -1 makes optax's muon return the ascent direction, to which the decay is then added by name: its own
    # decay knows no mask in the Adam group.
    direction = optax.contrib.muon(
        -1.0,
        ns_steps=ns_steps,
        beta=momentum,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_learning_rate=-adam_factor,
        muon_weight_dimension_numbers=matrix_dimensions(inputs.axes),
        consistent_rms=consistent_rms,
    )
    return optax.chain(
        in_auto_axes(direction),
        optax.add_decayed_weights(inputs.weight_decay, inputs.decays),
        optax.scale_by_learning_rate(inputs.schedule),
    )


def matrix_dimensions(axes: PyTree) -> PyTree:
    """Says which dimensions of each parameter form the rows and columns of a matrix.

    Args:
      axes: pytree like params whose leaves are tuples of logical axis names.

    Returns:
      The same structure with ``optax.contrib.MuonDimensionNumbers`` (input dimensions, output dimensions; the stacked
      ones are a batch), or ``None`` for a parameter that is no such matrix: vector, bias, norm scale, table or router.
    """

    def numbers(path: tuple[Any, ...], names: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
        if (
            len(set(names) - STACKED) < 2
            or LOOKUP_AXES.intersection(names)
            or not set(EXCLUDED).isdisjoint(path_names(path))
        ):
            return None
        return optax.contrib.MuonDimensionNumbers(*matrix_axes(names))

    return jax.tree_util.tree_map_with_path(numbers, axes, is_leaf=lambda node: isinstance(node, tuple))
