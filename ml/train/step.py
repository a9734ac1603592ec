"""One optimizer step: microbatches in, a new state and a handful of scalars out."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ml.models import SelfAttention, Transformer, head_params
from ml.models.moe import update_router_bias
from ml.train.config import TrainConfig
from ml.train.loss import chunked_loss
from ml.train.state import TrainState

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_loss(model: Transformer, config: TrainConfig) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns ``(params, microbatch, expert_counts=None) -> (objective, metrics)``, summed over counted tokens.

    ``expert_counts [layers, experts]`` are those of the same step's earlier microbatches; ``metrics`` holds this one's.
    """
    moe = model.config.moe

    def logits_of(head, hidden):
        return model.apply({"params": head}, hidden, method="logits")

    def loss(params, batch, expert_counts=None):
        strategy = SelfAttention(batch["segment_ids"], config.attention)
        outputs: Any = model.apply(
            {"params": params},
            batch["tokens"],
            strategy,
            batch["positions"],
            valid=batch["segment_ids"] > 0,
            expert_counts=expert_counts,
        )
        hidden, _, stats = outputs
        head, mask = head_params(model.config, params), batch["loss_mask"]
        objective, nll = chunked_loss(logits_of, head, hidden, batch["targets"], mask, config.z_loss, config.loss_chunk)
        balance = stats.balance * mask.sum()
        if moe is not None:
            objective = objective + moe.aux_loss_weight * balance
        return objective, {"loss": nll, "balance": balance, "expert_counts": stats.counts}

    return loss


def make_train_step(
    model: Transformer, tx: optax.GradientTransformation, schedule: optax.Schedule, config: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step ``(state, batch [microbatches, rows, length]) -> (state, metrics)``; jit it, donating the state.

    The loss is divided by the number of counted tokens of the *whole* batch, so the update does not depend on how the
    batch is cut. A step whose loss or gradient is not finite leaves the state as it was, but for two counters.
    """
    moe = model.config.moe
    grad_of = jax.value_and_grad(make_loss(model, config), has_aux=True)

    def train_step(state, batch):
        tokens = batch["loss_mask"].sum()

        def accumulate(total, microbatch):
            (objective, metrics), grads = grad_of(state.params, microbatch, total[1]["expert_counts"])
            return jax.tree.map(jnp.add, total, (grads, metrics | {"objective": objective})), None

        scalars = dict.fromkeys(("loss", "balance", "objective"), jnp.zeros((), jnp.float32))
        experts = (model.config.num_layers, moe.num_experts if moe else 0)
        scalars["expert_counts"] = jnp.zeros(experts, jnp.int32)
        zeros = (jax.tree.map(jnp.zeros_like, state.params), scalars)
        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, batch)
        expert_counts = metrics.pop("expert_counts")
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1), (grads, metrics))

        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["objective"])
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if moe and moe.bias_update_rate:
            params = update_router_bias(params, expert_counts, moe.bias_update_rate)
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
