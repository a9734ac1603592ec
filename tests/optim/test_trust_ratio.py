import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ml.models import ResNetConfig, init_params, logical_axes, module_of
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.optim.trust_ratio import scale_by_trust_ratio


def apply(axes, updates, params, **options):
    transform = scale_by_trust_ratio(axes, **options)
    return jax.jit(transform.update)(updates, transform.init(params), params)[0]


def test_two_layers_get_the_ratios_1_and_100():
    # Pooled over the stack, both would get sqrt((1 + 100**2) / 2) = 70.7.
    params = {"kernel": jnp.stack([jnp.ones((3, 4)), 100 * jnp.ones((3, 4))])}
    updates = {"kernel": jnp.ones((2, 3, 4))}
    scaled = apply({"kernel": ("layers", "embed", "mlp")}, updates, params)
    np.testing.assert_allclose(scaled["kernel"][0], 1, rtol=1e-6)
    np.testing.assert_allclose(scaled["kernel"][1], 100, rtol=1e-6)


def test_stacked_axes_may_lie_anywhere_and_experts_are_separate():
    scales = np.array([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]], np.float32)  # [layers, expert]
    params = {"kernel": np.einsum("le,mn->mlne", scales, np.ones((4, 5), np.float32))}
    scaled = apply(
        {"kernel": ("embed", "layers", "mlp", "expert")}, {"kernel": np.ones((4, 2, 5, 3), np.float32)}, params
    )
    np.testing.assert_allclose(scaled["kernel"], params["kernel"], rtol=1e-6)


def test_update_norm_equals_weight_norm_per_tensor_and_excluded_leaves_pass(axes, params, gradients):
    scaled = apply(axes, gradients[0], params)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        names = jax.tree_util.keystr(path, simple=True, separator="/")
        node_axes, node_scaled, node_gradient = axes, scaled, gradients[0]
        for name in names.split("/"):
            node_axes, node_scaled, node_gradient = node_axes[name], node_scaled[name], node_gradient[name]
        if names.endswith(("scale", "bias")):
            np.testing.assert_array_equal(node_scaled, node_gradient)
            continue
        inside = tuple(i for i, name in enumerate(node_axes) if name not in ("layers", "expert"))
        norms = [np.sqrt(np.sum(np.square(np.float64(a)), axis=inside)) for a in (x, node_scaled)]
        np.testing.assert_allclose(norms[1], norms[0], rtol=1e-6, err_msg=names)


@pytest.mark.parametrize("zero", ["weights", "updates"])
def test_ratio_is_one_where_either_norm_is_zero_even_with_bounds(zero):
    x, u = np.full((2, 3), 5.0, np.float32), np.full((2, 3), 2.0, np.float32)
    (x if zero == "weights" else u)[0] = 0
    scaled = apply({"w": ("layers", "embed")}, {"w": u}, {"w": x}, norm_min=7.0, ratio_min=3.0)["w"]
    np.testing.assert_array_equal(scaled[0], u[0])
    np.testing.assert_allclose(scaled[1], 2.0 * max(5 * np.sqrt(3) / (2 * np.sqrt(3)), 3.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({}, [0.5, 5.0, 50.0]),
        ({"norm_max": 10.0}, [0.5, 5.0, 5.0]),
        ({"norm_min": 4.0}, [2.0, 5.0, 50.0]),
        ({"ratio_max": 3.0}, [0.5, 3.0, 3.0]),
        ({"ratio_min": 1.0, "ratio_max": 10.0}, [1.0, 5.0, 10.0]),
    ],
)
def test_bounds(bounds, expected):
    params, updates = {"w": jnp.array([[1.0], [10.0], [100.0]])}, {"w": jnp.full((3, 1), 2.0)}
    scaled = apply({"w": ("layers", "embed")}, updates, params, **bounds)["w"]
    np.testing.assert_allclose(scaled[:, 0] / 2.0, expected, rtol=1e-6)


def test_norms_are_float32_for_bfloat16_weights():
    # sqrt(3000) = 54.772 would be 54.75 in bfloat16.
    params, updates = {"w": jnp.ones(3000, jnp.bfloat16)}, {"w": jnp.ones(3000)}
    np.testing.assert_allclose(apply({"w": ("embed",)}, updates, params)["w"], 1, rtol=1e-6)
    half = jax.tree.map(lambda u: u.astype(jnp.bfloat16), updates)
    assert apply({"w": ("embed",)}, half, params)["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["lamb", "lars", "lars_2017"])
def test_ratios_are_reported_per_tensor_and_asking_changes_nothing(name, axes, params, gradients):
    optimizer = OptimizerConfig(name, 1.0, clip_norm=1e9)  # clipping stands before, and must let the question through
    schedule = ScheduleConfig(kind="constant", warmup_fraction=0.0)
    tx, _ = make_optimizer(optimizer, schedule, total_steps=1, batch_size=1, axes=axes)

    def step(asked, gradients, params):
        seen = {}
        more = {"trust_ratios": seen} if asked else {}
        return optax.with_extra_args_support(tx).update(gradients, tx.init(params), params, **more)[0], seen

    silent, nothing = jax.jit(step, static_argnums=0)(False, gradients[0], params)
    updates, seen = jax.jit(step, static_argnums=0)(True, gradients[0], params)
    jax.tree.map(np.testing.assert_array_equal, updates, silent)
    kernels = {"embed/embedding": (), "unembed/kernel": (), "layers/attention/query/kernel": (2,)}
    seen = {path.removeprefix("trust_ratio/"): ratio for path, ratio in seen.items()}
    assert not nothing and {path: ratio.shape for path, ratio in seen.items()} == kernels | {
        "layers/moe/router/kernel": (2,),
        "layers/moe/up/kernel": (2, 2),
    }
    x, g = (np.float64(tree["layers"]["moe"]["up"]["kernel"]) for tree in (params, gradients[0]))
    # The first step's direction: Adam's is g / (|g| + eps), that of LARS a tenth of g, that of 2017 g itself.
    u = {"lamb": g / (np.abs(g) + 1e-6), "lars": 0.1 * g, "lars_2017": 1000 * g}[name]
    ratios = np.sqrt((x**2).sum((2, 3)) / (u**2).sum((2, 3)))
    np.testing.assert_allclose(seen["layers/moe/up/kernel"], ratios, rtol=1e-5)


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_batch_norms_neither_decay_nor_take_a_trust_ratio(name):
    config = ResNetConfig(num_classes=5, blocks=(1,), bottleneck=False, width=4, stem="small")
    axes = logical_axes(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))
    params, grads = (jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes) for _ in range(2))
    optimizer, schedule = OptimizerConfig(name, 1.0, weight_decay=0.1), ScheduleConfig("constant", warmup_fraction=0.0)
    tx, _ = make_optimizer(optimizer, schedule, total_steps=1, batch_size=1, axes=axes)
    update = jax.jit(lambda params: tx.update(grads, tx.init(params), params)[0])
    small, large = update(params), update(jax.tree.map(lambda x: 3 * x, params))
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/"): not np.array_equal(one, other)
        for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(small), jax.tree.leaves(large), strict=True)
    }
    assert sum("norm" in path for path in moved) >= 6
    assert moved == {path: path.endswith("kernel") for path in moved}


def test_missing_or_wrong_axes_name_the_parameter():
    with pytest.raises(ValueError, match=r"no logical axes.*\['v'\]"):
        apply({"w": ("embed",)}, {"v": jnp.ones(3)}, {"v": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(3, 3\)"):
        apply({"w": ("embed",)}, {"w": jnp.ones((3, 3))}, {"w": jnp.ones((3, 3))})
