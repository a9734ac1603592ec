"""Held-out loss: summed, not averaged over batches, so that it does not depend on how the text is cut."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ml.models import Transformer
from ml.parallel import Rules, loader_share, place_batch
from ml.train.config import TrainConfig
from ml.train.objective import make_loss
from ml.train.pipeline import pipelined_loss


@dataclasses.dataclass(frozen=True)
class HeldoutLoss:
    """The loss on held-out text.

    Attributes:
      nats: cross-entropy, summed over all targets.
      tokens: number of targets.
    """

    nats: float
    tokens: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.nats / max(self.tokens, 1)

    def bits_per_byte(self, text_bytes: int) -> float:
        """Bits per byte, if the targets cover a text of ``text_bytes`` exactly once; comparable to a compressor's."""
        return self.nats / math.log(2) / text_bytes


def make_evaluate(model: Transformer, config: TrainConfig, rules: Rules) -> Callable[..., HeldoutLoss]:
    """Returns ``(params, batches, limit=None) -> HeldoutLoss`` over the first ``limit`` batches (``None``: all)."""
    config = dataclasses.replace(config, z_loss=0.0)
    staged = rules.mesh.shape["stage"] > 1
    loss = pipelined_loss(model, config, rules) if staged else make_loss(model, config, rules)

    @jax.jit
    def accumulate(total, params, batch):
        _, metrics = loss(params, batch if staged else jax.tree.map(lambda x: x[0], batch))
        return total + jnp.stack([metrics["loss"], batch["loss_mask"].sum()])

    def evaluate(params, batches, limit=None):
        nats, tokens = 0.0, 0
        for group in _groups(batches, limit):
            # float32 sums of a few batches on the device, float64 beyond: a long text must not lose its last digits.
            zeros = np.zeros(2, np.float32)
            total = jax.make_array_from_callback(zeros.shape, rules.sharding(None), zeros.__getitem__)
            for batch in group:
                total = accumulate(total, params, place_batch(batch, rules, _parts(batch, rules)))
            part = jax.device_get(total)
            nats, tokens = nats + float(part[0]), tokens + round(float(part[1]))
        return HeldoutLoss(nats, tokens)

    return evaluate


def _parts(batch: Any, rules: Rules) -> int:
    """Into how many microbatches a batch is cut: as many as there are stages to keep busy, if its rows divide."""
    stages = rules.mesh.shape["stage"]
    return stages if len(batch["tokens"]) % (stages * len(loader_share(rules)[0])) == 0 else 1


def _groups(batches: Iterable[Any], limit: int | None, size: int = 16) -> Iterable[list[Any]]:
    iterator = itertools.islice(batches, limit)
    while group := list(itertools.islice(iterator, size)):
        yield group
