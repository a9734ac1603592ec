"""What a train step minimizes, and what else a loss wants of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ml.train.contrastive import Embedded

Batch = Mapping[str, jax.Array]
# Scalars, and trees of what `Objective.extras` names.
Metrics = dict[str, Any]


def _unmoved(params: PyTree, model_state: Any, extras: Any, count: jax.Array) -> tuple[PyTree, Any]:
    del extras, count
    return params, model_state


def _nothing(*arguments: Any) -> dict[str, jax.Array]:
    del arguments
    return {}


def _without_state(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, model_state, batch: loss(params, batch)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss and what it is averaged over.

    Attributes:
      loss: ``(params, microbatch, extras=None) -> (objective, metrics)``, summed over what the masks count; ``extras``
        are those of the same step's earlier microbatches, and ``metrics`` holds this one's besides.
      masks: metric -> the array of a batch whose sum it is averaged over. ``loss_mask`` is that of the loss.
      counts: batch -> numbers to report of it: ``tokens``, how many units it trains on, and others.
      dropout: whether the loss wants a ``dropout_key`` with each microbatch in training.
      extras: what ``loss`` adds up over microbatches besides metrics, each as it starts: experts' loads, batch
        statistics.
      settle: ``(updated params, model_state, extras, count of loss_mask) -> (params, model_state)``: what a step moves
        by other means than the gradient.
      model_state: what a step carries on besides parameters, as a run begins with it: running statistics, by
        collection.
      carried: ``batch as shapes -> dict``: what a step leaves to be read together with the next batch, as a run begins.
      carry: ``(params before the step, batch) -> dict``: that, for the next step. It is taken over from a skipped step
        too, since the next batch comes all the same.
      heldout: ``(params, model_state, batch) -> (objective, metrics)`` for evaluation; ``None``: that is ``loss``.
      embedded: the loss of a step, where it is one of all rows' embeddings and no sum over microbatches; ``loss`` is
        then that of a single microbatch.
    """

    loss: Callable[..., tuple[jax.Array, Metrics]]
    masks: Mapping[str, str]
    counts: Callable[[Batch], Metrics]
    dropout: bool = False
    extras: Callable[[], dict[str, PyTree]] = dict
    settle: Callable[..., tuple[PyTree, Any]] = _unmoved
    model_state: Callable[[], dict[str, PyTree]] = dict
    carried: Callable[[Batch], dict[str, jax.Array]] = _nothing
    carry: Callable[[PyTree, Batch], dict[str, jax.Array]] = _nothing
    heldout: Callable[..., tuple[jax.Array, Metrics]] | None = None
    embedded: Embedded | None = None

    @property
    def evaluation(self) -> Callable[..., tuple[jax.Array, Metrics]]:
        """``(params, model_state, batch) -> (objective, metrics)`` as evaluation has it."""
        return self.heldout or _without_state(self.loss)

    def weighed(self, batch: Batch, step: Int[Array, ""]) -> tuple[Batch, jax.Array]:
        """Readies a whole step's batch, so that dividing sums by the sum of ``loss_mask`` averages everything.

        Args:
          batch: ``[microbatches, rows, ...]``.
          step: number of the step, from which the keys of its dropout follow.

        Returns:
          The batch with all other masks scaled accordingly, and the sum of ``loss_mask``.
        """
        count = batch["loss_mask"].sum()
        others = sorted({name for name in self.masks.values() if name != "loss_mask"})
        scaled = {name: batch[name] * (count / jnp.maximum(batch[name].sum(), 1)) for name in others}
        keys = {"dropout_key": dropout_keys(step, len(batch["loss_mask"]))} if self.dropout else {}
        return {**batch, **scaled, **keys}, count


def dropout_keys(step: Int[Array, ""], microbatches: int) -> jax.Array:
    """A key for each microbatch of a step, the same whenever the step is done again (after a restart)."""
    return jax.random.split(jax.random.fold_in(jax.random.key(0), step), microbatches)
