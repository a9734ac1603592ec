"""BASIC: the larger the contrastive batch, the better pairs find each other, and blocks of it are not the same.

Two noisy views of each handwritten digit, its pixels and a fixed random map of them, are embedded by a network each.
Batches are exact (`ml.train.contrastive`): every pair has all others as negatives, though only a part is embedded at a
time. Beside them stands the largest batch cut into blocks of the smallest, each pair with the negatives of its block
alone: the same examples, the same number of steps, other negatives (what naive gradient accumulation would train).
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.studies.batch_sweep import clearly_less, tune
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.train.contrastive import Embedded, two_pass_value_and_grad
from ml.train.contrastive_loss import contrastive_loss
from ml.train.reporting.progress import ProgressDisplay

_PIXELS = 64
_TEMPERATURE = 0.1
_AXES = {"first": ("embed", "mlp"), "first_bias": ("mlp",), "second": ("mlp", "embed")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How large the study is.

    Attributes:
      batch_sizes: in pairs, ascending; the last is also cut into blocks of the first.
      part: pairs that are embedded at a time.
      steps: of each training.
      hidden, features: widths of each network and of the space they embed in.
      noise: standard deviation of what is added to each view, whose values lie in [0, 1] and [-1, 1].
      rates: where the search for each variant's best peak rate begins, ascending.
      test_pairs: held out, among which pairs are to be found.
      seeds: of parameters, order and noise.
      tuning_seeds: by which rates are chosen.
    """

    batch_sizes: tuple[int, ...]
    part: int
    steps: int
    hidden: int
    features: int
    noise: float
    rates: tuple[float, ...]
    test_pairs: int = 389
    seeds: tuple[int, ...] = (1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (11,)


_RATES = (0.001, 0.002, 0.004)
SETTINGS: Mapping[Budget, Setting] = {
    "cpu": Setting((16, 64, 256, 1024), part=256, steps=250, hidden=128, features=32, noise=0.3, rates=_RATES),
    "gpu": Setting(
        (16, 64, 256, 1024, 4096, 16_384), part=1024, steps=4000, hidden=1024, features=128, noise=0.3, rates=_RATES
    ),
}


def run(budget: Budget) -> Outcome:
    """See the module's docstring."""
    return study(SETTINGS[budget])


@dataclasses.dataclass(frozen=True)
class Found:
    """What the runs gave, by batch size; ``blocks`` is the largest batch in blocks of the smallest.

    Attributes:
      exact, blocks: share of test pairs found, one for each seed.
      rates: the best; that of ``blocks`` under 0.
    """

    exact: Mapping[int, tuple[float, ...]]
    blocks: tuple[float, ...]
    rates: Mapping[int, float]


def study(setting: Setting) -> Outcome:
    """Trains every variant at its best rate with every seed, and judges."""
    return judge(setting, measure(setting))


def measure(setting: Setting) -> Found:
    """All runs."""
    smallest, largest = setting.batch_sizes[0], setting.batch_sizes[-1]
    variants = {size: (size, None) for size in setting.batch_sizes} | {0: (largest, smallest)}
    found: dict[int, tuple[float, ...]] = {}
    rates: dict[int, float] = {}
    with ProgressDisplay(len(variants)) as progress:
        for done, (name, (size, block)) in enumerate(variants.items(), 1):
            training = make_training(setting, size, block)

            def missed(rate: float, seed: int, training: Callable[[float, int], float] = training) -> float:
                return 1 - training(rate, seed)

            losses = tune(missed, setting.rates, setting.tuning_seeds)
            rates[name] = min(losses, key=losses.__getitem__)
            found[name] = tuple(training(rates[name], seed) for seed in setting.seeds)
            progress.update(done, loss=1 - float(np.mean(found[name])), tokens=size * setting.steps)
    return Found({size: found[size] for size in setting.batch_sizes}, found[0], rates)


def make_training(setting: Setting, size: int, block: int | None) -> Callable[[float, int], float]:
    """Returns ``(peak rate, seed) -> share of test images that find their other view among all``.

    Args:
      setting: see there.
      size: pairs of a batch.
      block: pairs that are negatives of one another; ``None``: all of the batch.
    """
    train, test = (jnp.asarray(x) for x in _digits(setting.test_pairs))
    optimizer = OptimizerConfig("adamw", learning_rate=1.0, weight_decay=1e-4)
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.05)
    axes = {"image": _AXES, "other": _AXES, "logit": {"scale": ()}}
    tx, _ = make_optimizer(optimizer, schedule, total_steps=setting.steps, batch_size=size, axes=axes)
    rows = block or min(size, setting.part)

    def loss(head: PyTree, embeddings: Any, batch: PyTree) -> tuple[jax.Array, None]:
        del batch
        images, others = embeddings
        total, _ = contrastive_loss(images, others, head["logit"]["scale"], jnp.ones(len(images)), setting.part)
        return total / len(images), None

    exact = two_pass_value_and_grad(Embedded(_embedded, loss, lambda params: {"logit": params["logit"]}))

    def in_blocks(params: PyTree, batch: PyTree) -> tuple[tuple[jax.Array, None], PyTree]:
        each = jax.vmap(lambda part: jax.grad(lambda p: loss(p, _embedded(p, part), part)[0])(params))(batch)
        return (jnp.zeros(()), None), jax.tree.map(lambda x: x.mean(axis=0), each)

    gradient = exact if block is None else in_blocks

    @jax.jit
    def training(rate: Float[Array, ""], key: jax.Array) -> Float[Array, ""]:
        of_params, of_steps, of_test = jax.random.split(key, 3)
        params = _init(setting, of_params)

        def step(state: PyTree, key: jax.Array) -> tuple[PyTree, None]:
            params, opt_state = state
            chosen, of_noise = jax.random.split(key)
            pixels = train[jax.random.randint(chosen, (size,), 0, len(train))]
            batch = _views(setting, pixels, of_noise)
            _, grads = gradient(params, jax.tree.map(lambda x: x.reshape(size // rows, rows, _PIXELS), batch))
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
            return (params, opt_state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jax.random.split(of_steps, setting.steps))
        images, others = _embedded(params, _views(setting, test, of_test))
        return (jnp.argmax(images @ others.T, axis=1) == jnp.arange(len(test))).mean()

    return lambda rate, seed: float(training(rate, jax.random.key(seed)))


def _digits(held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits as rows of pixels in [0, 1]: to train on, and to test on."""
    from sklearn.datasets import load_digits

    pixels = np.random.default_rng(0).permutation(load_digits().data.astype(np.float32) / 16)
    return pixels[held_out:], pixels[:held_out]


def _views(setting: Setting, pixels: Float[Array, "n pixels"], key: jax.Array) -> dict[str, jax.Array]:
    """Both views of some digits, each with noise of its own."""
    image, other = jax.random.split(key)
    # The same for all: it is part of the data.
    mixing = jax.random.normal(jax.random.key(0), (_PIXELS, _PIXELS)) * 2 * _PIXELS**-0.5
    mixed = jnp.tanh((2 * pixels - 1) @ mixing)
    return {
        "image": pixels + setting.noise * jax.random.normal(image, pixels.shape),
        "other": mixed + setting.noise * jax.random.normal(other, pixels.shape),
    }


def _init(setting: Setting, key: jax.Array) -> PyTree:
    def network(key: jax.Array) -> dict[str, jax.Array]:
        first, second = jax.random.split(key)
        return {
            "first": jax.random.normal(first, (_PIXELS, setting.hidden)) * _PIXELS**-0.5,
            "first_bias": jnp.zeros(setting.hidden),
            "second": jax.random.normal(second, (setting.hidden, setting.features)) * setting.hidden**-0.5,
        }

    image, other = jax.random.split(key)
    return {"image": network(image), "other": network(other), "logit": {"scale": -jnp.log(_TEMPERATURE)}}


def _embedded(params: PyTree, batch: PyTree) -> tuple[jax.Array, jax.Array]:
    """Unit vectors of both views."""

    def network(name: str) -> jax.Array:
        weights = params[name]
        x = jax.nn.gelu(batch[name] @ weights["first"] + weights["first_bias"]) @ weights["second"]
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

    return network("image"), network("other")


def judge(setting: Setting, found: Found) -> Outcome:
    """What the shares say of the claim."""
    smallest, largest = setting.batch_sizes[0], setting.batch_sizes[-1]
    ours, blocks = np.array(found.exact[largest]), np.array(found.blocks)
    means = [float(np.mean(found.exact[size])) for size in setting.batch_sizes]
    rises = all(more > less for less, more in itertools.pairwise(means))
    better = clearly_less(blocks, ours)
    reasons = []
    if not rises:
        reasons.append(f"the share does not rise with each batch ({', '.join(f'{mean:.3f}' for mean in means)})")
    if not better:
        gain = float((ours - blocks).mean())
        reasons.append(f"blocks of {smallest} lose {gain:.3f} to the exact batch, which {len(ours)} seeds do not show")
    return Outcome(
        paper="Combined Scaling for Zero-shot Transfer Learning (BASIC, Pham et al. 2021)",
        url="https://arxiv.org/abs/2111.10050",
        have="Exact contrastive batches in the memory of a part (`ml/train/contrastive.py`), two towers "
        "(`ml/models/two_tower.py`)",
        claim="Retrieval rises with the contrastive batch, and a large batch cut into blocks with negatives of their "
        "own is worse than the exact one",
        setup=_setup(setting, found),
        baseline=Measured(f"blocks of {smallest}", tuple(map(float, blocks))),
        ours=Measured(f"exact batch of {largest:,}", tuple(map(float, ours))),
        unit="share of pairs found",
        relation=">",
        holds=rises and better,
        seeds=setting.seeds,
        reason="; ".join(reasons),
        panels=(_panel(setting, found),),
        details={
            "found": {str(size): list(values) for size, values in found.exact.items()},
            "rates": {str(size) if size else "blocks": rate for size, rate in found.rates.items()},
        },
    )


def _setup(setting: Setting, found: Found) -> str:
    sizes = ", ".join(f"{size:,}" for size in setting.batch_sizes)
    return (
        f"Noisy pixels of scikit-learn's digits, and a noisy tanh of a fixed random map of them, each embedded by an "
        f"MLP ({_PIXELS}, {setting.hidden}, {setting.features}); {setting.steps} steps of AdamW with cosine decay at "
        f"batches of {sizes} pairs, {setting.part} embedded at a time, each variant at its best peak rate by another "
        f"seed. Counted is how many of {setting.test_pairs} held-out images have their own other view nearest. The "
        f"blocks see the same number of pairs as the largest batch. Holds if the mean rises with every batch, and the "
        f"exact batch is better than blocks by more than two standard errors, paired by seed."
    )


def _panel(setting: Setting, found: Found) -> Panel:
    def series(name: str, values: Mapping[int, tuple[float, ...]]) -> Series:
        y = tuple(float(np.mean(v)) for v in values.values())
        spread = tuple(float(np.std(v, ddof=1)) for v in values.values())
        return Series(name, tuple(map(float, values)), y, spread, marks_only=len(values) == 1)

    largest = setting.batch_sizes[-1]
    blocks = series(f"in blocks of {setting.batch_sizes[0]}", {largest: found.blocks})
    return Panel("batch size (pairs)", "share of pairs found", (series("exact", found.exact), blocks), x_log=True)
