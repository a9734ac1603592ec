"""One optimizer step: microbatches in, a new state, a handful of scalars and each layer's trust ratio out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from ml.models import Model
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.gradients import make_gradients
from ml.train.objective import make_objective
from ml.train.objective_class import Batch, Metrics
from ml.train.offload import moved_to_device, moved_to_host
from ml.train.state import TrainState


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    rules: Rules | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the step ``(state, batch [microbatches, rows, ...]) -> (state, metrics)``; jit it, donating the state.

    Everything is averaged over the *whole* batch, so the update does not depend on how the batch is cut. A step whose
    loss or gradient is not finite leaves the state as it was, but for two counters.

    Args:
      model: on the mesh of ``rules``.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      config: of training.
      rules: the layout; ``None``: off any mesh.
    """
    gradients = make_gradients(model, config, rules)
    objective, update = make_objective(model, config, rules), optax.with_extra_args_support(tx).update

    def train_step(state, batch):
        weighed, count = objective.weighed({**batch, **state.carried}, state.step)
        *sums, extras, more = gradients(state.params, weighed)
        grads, metrics = jax.tree.map(lambda x: x / jnp.maximum(count, 1), sums)
        old_opt_state = moved_to_device(state.opt_state) if config.offload_optimizer else state.opt_state
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(metrics["objective"])
        updates, opt_state = update(grads, old_opt_state, state.params, trust_ratios=more)
        params = optax.apply_updates(state.params, updates)
        params, model_state = objective.settle(params, state.model_state, extras, count)
        ema = state.ema and jax.tree.map(lambda a, p: config.ema * a + (1 - config.ema) * p, state.ema, params)
        params, opt_state, ema, model_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, ema, model_state),
            (state.params, old_opt_state, state.ema, state.model_state),
        )
        metrics |= more | objective.counts(batch)
        metrics |= {
            "learning_rate": schedule(state.step - state.skipped),  # the optimizer has not counted skipped steps
            "gradient_norm": grad_norm,
            "parameter_norm": optax.tree.norm(params),
            "skipped": state.skipped + ~finite,
        }
        opt_state = moved_to_host(opt_state) if config.offload_optimizer else opt_state
        carried = objective.carry(state.params, batch)
        return TrainState(state.step + 1, params, opt_state, ema, metrics["skipped"], model_state, carried), metrics

    return train_step
