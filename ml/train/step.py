"""One optimizer step: microbatches in, a new state and a handful of scalars out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml.models import SelfAttention, Transformer, head_params
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss
from ml.train.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_loss(model: Transformer, config: TrainConfig) -> Callable[[Any, Batch], tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch) -> (objective, metrics)``, both summed over the microbatch's counted tokens."""
    moe = model.config.moe

    def logits_of(head, hidden):
        return model.apply({"params": head}, hidden, method="logits")

    def loss(params, batch):
        strategy = SelfAttention(batch["segment_ids"], config.attention)
        outputs: Any = model.apply({"params": params}, batch["tokens"], strategy, batch["positions"])
        hidden, _, balance = outputs
        head, mask = head_params(model.config, params), batch["loss_mask"]
        objective, nll = chunked_loss(logits_of, head, hidden, batch["targets"], mask, config.z_loss, config.loss_chunk)
        balance = balance * mask.sum()
        if moe is not None:
            objective = objective + moe.aux_loss_weight * balance
        return objective, {"loss": nll, "balance": balance}

    return loss


def make_train_step(
    model: Transformer, tx: optax.GradientTransformation, schedule: optax.Schedule, config: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step ``(state, batch [microbatches, rows, length]) -> (state, metrics)``; jit it, donating the state.

    The loss is divided by the number of counted tokens of the *whole* batch, so the update does not depend on how the
    batch is cut. A step whose loss or gradient is not finite leaves the state as it was, but for two counters.
    """
    grad_of = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def train_step(state, batch):
        tokens = batch["loss_mask"].sum()

        def accumulate(total, microbatch):
            (objective, metrics), grads = grad_of(state.params, microbatch)
            return jax.tree.map(jnp.add, total, (grads, metrics | {"objective": objective})), None

        scalars = dict.fromkeys(("loss", "balance", "objective"), jnp.zeros((), jnp.float32))
        zeros = (jax.tree.map(jnp.zeros_like, state.params), scalars)
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, batch)
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), (grads, metrics))

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["objective"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema and jax.tree.map(lambda a, p: config.ema * a + (1 - config.ema) * p, state.ema, params)
        params, opt_state, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema),
            (state.params, state.opt_state, state.ema),
        )
        metrics |= {
            "learning_rate": schedule(state.step - state.skipped),  # the optimizer has not counted skipped steps
            "gradient_norm": grad_norm,
            "parameter_norm": optax.tree.norm(params),
            "tokens": tokens,
            "skipped": state.skipped + ~finite,
        }
        return TrainState(state.step + 1, params, opt_state, ema, metrics["skipped"]), metrics

    return train_step
