"""A tiny network and batches of random images, for the tests of training on images."""

from typing import Any

import jax
import numpy as np

from ml.models import ResNetConfig, init_params, logical_axes, module_of
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import Rules
from ml.train.config import TrainConfig
from ml.train.objective import make_objective
from ml.train.state import TrainState, init_state
from ml.train.step import make_train_step

MODEL = ResNetConfig(
    num_classes=3,
    blocks=(1, 1),
    bottleneck=False,
    width=4,
    channels=1,
    stem="small",
    pixel_mean=(0.4,),
    pixel_std=(0.3,),
)
SIZE, ROWS = 6, 16
# Plain gradient descent with rate 1: the update is the gradient, and no division hides its size.
GRADIENT = OptimizerConfig("sgd", 1.0, options={"momentum": 0.0})


def image_batch(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels, brighter in later rows, so that groups of rows have statistics of their own."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100 + 155 * np.arange(1, rows + 1).reshape(-1, 1, 1, 1) // rows, (rows, SIZE, SIZE, 1))
    return {
        "images": images.astype(np.uint8),
        "targets": rng.integers(0, MODEL.num_classes, (rows, 1)).astype(np.int32),
        "loss_mask": np.ones((rows, 1), np.float32),
        "broken": np.zeros((rows, 1), np.float32),
    }


def cut(batch: dict[str, np.ndarray], microbatches: int) -> dict[str, np.ndarray]:
    """``[microbatches, rows, ...]``."""
    return {name: x.reshape(microbatches, -1, *x.shape[1:]) for name, x in batch.items()}


def initial_params(config: ResNetConfig, seed: int = 0) -> Any:
    """Random parameters from NumPy, so that every part of the network has its say."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))

    def leaf(path, shape):
        one = path[-1].key == "scale"
        return (one + rng.normal(size=shape.shape) * (0.1 if one else 0.3)).astype(np.float32)

    return jax.tree.map_with_path(leaf, shapes)


def setting(
    config: ResNetConfig = MODEL, optimizer: OptimizerConfig = GRADIENT, rules: Rules | None = None, **train: Any
) -> tuple[Any, TrainState]:
    """The jitted step and a fresh state, on the mesh in use."""
    trained = TrainConfig(**{"steps": 10, "batch_size": ROWS, "remat": "none", **train})
    axes = logical_axes(config)
    tx, rate = make_optimizer(optimizer, ScheduleConfig(kind="constant"), total_steps=10, batch_size=ROWS, axes=axes)
    model = module_of(config, **({"place": rules.spec} if rules else {}))
    params = initial_params(config)
    objective = make_objective(model, trained, rules)
    if rules is None:
        params = jax.tree.map(jax.numpy.asarray, params)
        zero = jax.numpy.zeros((), jax.numpy.int32)
        ema = jax.tree.map(jax.numpy.copy, params) if trained.ema else None
        state = TrainState(zero, params, tx.init(params), ema, zero, objective.model_state())
    else:
        params = jax.device_put(params, rules.shardings(axes, params))
        ema = trained.ema > 0
        state = init_state(model, tx, rules, seed=0, ema=ema, params=params, model_state=objective.model_state)
    return jax.jit(make_train_step(model, tx, rate, trained, rules)), state
