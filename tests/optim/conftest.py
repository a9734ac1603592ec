"""A small decoder's parameters, axes and gradients, in the shape that scanned layers give them."""

import jax
import numpy as np
import pytest

SIZES = {
    "vocab": 16,
    "embed": 8,
    "layers": 2,
    "norm": 8,
    "heads": 4,
    "head_dim": 2,
    "expert_logits": 2,
    "expert": 2,
    "mlp": 8,
}

AXES = {
    "embed": {"embedding": ("vocab", "embed")},
    "layers": {
        "attention_norm": {"scale": ("layers", "norm")},
        "attention": {
            "query": {"kernel": ("layers", "embed", "heads", "head_dim"), "bias": ("layers", "heads", "head_dim")},
        },
        "moe": {
            "router": {"kernel": ("layers", "embed", "expert_logits")},
            "up": {"kernel": ("layers", "expert", "embed", "mlp")},
        },
    },
    "final_norm": {"scale": ("norm",)},
    "unembed": {"kernel": ("embed", "vocab")},
}


def _random(axes, seed, layer_growth):
    """Normal arrays; layer 1 is ``layer_growth`` times layer 0, so that pooling over layers shows."""
    rng = np.random.default_rng(seed)

    def leaf(names):
        values = rng.normal(size=[SIZES[name] for name in names])
        if names[0] == "layers":
            values *= layer_growth ** np.arange(SIZES["layers"]).reshape([-1] + [1] * (len(names) - 1))
        return values.astype(np.float32)

    return {key: leaf(value) if isinstance(value, tuple) else _random(value, seed + 1 + i, layer_growth)
            for i, (key, value) in enumerate(axes.items())}  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def quick_compilation():
    """These tests compile some hundred small programs and run each for microseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def axes():
    return AXES


@pytest.fixture(scope="session")
def params():
    return _random(AXES, 0, 3.0)


@pytest.fixture(scope="session")
def gradients():
    """Five steps' gradients."""
    return [_random(AXES, 1000 * (step + 1), 0.1) for step in range(5)]
