import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml.optim.masks import excluding
from ml.optim.stacking import per_layer


def test_biases_and_scales_are_excluded_by_name_at_any_depth(params):
    mask = excluding()(params)
    marked = {
        jax.tree_util.keystr(p, simple=True, separator="/")
        for p, keep in jax.tree_util.tree_leaves_with_path(mask)
        if not keep
    }
    assert marked == {"layers/attention_norm/scale", "layers/attention/query/bias", "final_norm/scale"}
    assert excluding()({"bias": {"values": 1.0}, "biased": 1.0}) == {"bias": {"values": False}, "biased": True}


def test_names_may_be_modules(params):
    mask = excluding(("bias", "scale", "embed"))(params)
    assert not mask["embed"]["embedding"] and mask["unembed"]["kernel"]


def test_per_layer_splits_statistics_by_layer_and_expert():
    # clip_by_block_rms(1) on slices of RMS 0.5 and 2: pooled, their common RMS of 1.46 would shrink both.
    transform = per_layer(optax.clip_by_block_rms(1.0), {"w": ("layers", "expert", "embed")})
    updates = {"w": jnp.array([[[0.5, -0.5]], [[2.0, -2.0]]])}
    clipped, _ = jax.jit(transform.update)(updates, transform.init(updates), updates)
    np.testing.assert_allclose(clipped["w"], [[[0.5, -0.5]], [[1.0, -1.0]]], rtol=1e-6)


def test_per_layer_refuses_a_stacked_axis_that_is_not_leading():
    transform = per_layer(optax.scale_by_sm3(), {"w": ("embed", "layers")})
    with pytest.raises(ValueError, match="stacked axes must come first"):
        transform.init({"w": jnp.ones((2, 3))})
