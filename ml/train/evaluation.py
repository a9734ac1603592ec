"""Held-out loss: summed, not averaged over batches, so that it does not depend on how the text is cut."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml.models import Model, Transformer
from ml.parallel import Rules, loader_share, place_batch
from ml.train.config import TrainConfig
from ml.train.objective import make_objective
from ml.train.pipeline import pipelined_loss


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """The loss on held-out text.

    Attributes:
      nats: cross-entropy, summed over all targets.
      tokens: number of targets.
      more: what else the objective reports, averaged: of an encoder ``accuracy`` and the next sentence's figures.
    """

    nats: float
    tokens: int
    more: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    @property
    def scalars(self) -> dict[str, float]:
        """All of it by name, averaged."""
        return {"loss": self.per_token, **self.more}

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits per byte, if the targets cover a text of ``text_bytes`` exactly once; comparable to a compressor's."""
        return self.nats / math.log(2) / text_bytes


def make_evaluate(model: Model, config: TrainConfig, rules: Rules) -> Callable[..., HeldoutLoss]:
    """Returns ``(params, batches, limit=None, model_state={}) -> HeldoutLoss``.

    It goes over the first ``limit`` batches (``None``: all); ``model_state`` is that of the `TrainState`.
    """
    config = dataclasses.replace(config, z_loss=0.0, adversarial="none")
    staged = rules.mesh.shape["stage"] > 1
    objective = make_objective(model, config, rules)
    # How evenly experts are used is a matter of training.
    names = [name for name in objective.masks if name != "balance"]
    masks = sorted(set(objective.masks.values()))
    if staged and isinstance(model, Transformer):
        objective = dataclasses.replace(objective, loss=pipelined_loss(model, config, rules))
    loss = objective.evaluation

    @jax.jit
    def accumulate(total, params, model_state, batch):
        _, metrics = loss(params, model_state, batch if staged else jax.tree.map(lambda x: x[0], batch))
        return total + jnp.stack([*(metrics[name] for name in names), *(batch[mask].sum() for mask in masks)])

    def evaluate(params, batches, limit=None, model_state=None):
        sums = np.zeros(len(names) + len(masks))
        for group in _groups(batches, limit):
            # float32 sums of a few batches on the device, float64 beyond: a long text must not lose its last digits.
            zeros = np.zeros(len(sums), np.float32)
            total = jax.make_array_from_callback(zeros.shape, rules.sharding(None), zeros.__getitem__)
            for batch in group:
                placed = place_batch(batch, rules, _parts(batch, rules))
                total = accumulate(total, params, model_state or {}, placed)
            sums += jax.device_get(total)
        counts = dict(zip(masks, sums[len(names) :].tolist(), strict=True))
        totals = dict(zip(names, sums.tolist(), strict=False))
        more = {name: total / max(counts[objective.masks[name]], 1) for name, total in totals.items() if name != "loss"}
        return HeldoutLoss(totals["loss"], round(counts["loss_mask"]), more)

    return evaluate


def _parts(batch: Any, rules: Rules) -> int:
    """Into how many microbatches a batch is cut: as many as there are stages to keep busy, if its rows divide."""
    stages = rules.mesh.shape["stage"]
    return stages if len(batch["loss_mask"]) % (stages * len(loader_share(rules)[0])) == 0 else 1


def _groups(batches: Iterable[Any], limit: int | None, size: int = 16) -> Iterable[list[Any]]:
    iterator = itertools.islice(batches, limit)
    while group := list(itertools.islice(iterator, size)):
        yield group
