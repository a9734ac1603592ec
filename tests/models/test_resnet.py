"""ResNets: published sizes and FLOPs, and logits and statistics against NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resnet_reference import Reference

from ml.models import (
    ResNetConfig,
    init_model_state,
    init_params,
    logical_axes,
    module_of,
    num_parameters,
    resnet_config,
)
from ml.models.resnet import convolve
from ml.models.resnet_cost import convolutions, forward_flops

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = ResNetConfig(
    num_classes=5,
    blocks=(1, 2),
    bottleneck=False,
    width=4,
    channels=1,
    stem="small",
    pixel_mean=(0.3,),
    pixel_std=(0.4,),
)
BOTTLENECK = ResNetConfig(num_classes=5, blocks=(1, 1), width=4)
IMAGES = {"small": (3, 6, 6, 1), "bottleneck": (3, 12, 10, 3)}
CONFIGS = {"small": SMALL, "bottleneck": BOTTLENECK}


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))

    def leaf(path, shape):
        one = path[-1].key == "scale"
        return (one + rng.normal(size=shape.shape) * (0.1 if one else 0.3)).astype(np.float32)

    return jax.tree.map_with_path(leaf, shapes)


def random_images(name, seed=1):
    return np.random.default_rng(seed).integers(0, 256, IMAGES[name], dtype=np.uint8)


# As counted in torchvision's models; multiplications for one image of 224 pixels, as its documentation has them.
PUBLISHED = {
    18: (11_689_512, 1.814e9),
    34: (21_797_672, 3.664e9),
    50: (25_557_032, 4.089e9),
    101: (44_549_160, 7.801e9),
}


@pytest.mark.parametrize("depth", sorted(PUBLISHED))
def test_has_the_published_parameters_and_flops(depth):
    config = resnet_config(depth)
    parameters, multiplications = PUBLISHED[depth]
    assert num_parameters(config) == parameters
    assert forward_flops(config, 224) == pytest.approx(2 * multiplications, rel=1e-3)


@pytest.mark.parametrize("config", [*CONFIGS.values(), resnet_config(50)])
def test_the_formula_counts_what_is_made(config):
    shapes = jax.eval_shape(lambda: init_params(module_of(config), jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == num_parameters(config)
    kernels = [x for path, x in jax.tree.leaves_with_path(shapes) if path[-1].key == "kernel" and x.ndim == 4]
    expected = [(c.window, c.window, c.inputs, c.features) for c in convolutions(config, 64)]
    assert sorted(x.shape for x in kernels) == sorted(expected)
    names = jax.tree.leaves(logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    assert [len(n) for n in names] == [x.ndim for x in jax.tree.leaves(shapes)]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_logits_and_statistics_are_those_of_numpy(name):
    config, pixels = CONFIGS[name], random_images(name)
    params, model = random_params(config), module_of(config)
    rng = np.random.default_rng(2)
    statistics = jax.tree.map(lambda x: (0.5 + rng.random(x.shape)).astype(np.float32), init_model_state(model))

    @jax.jit
    def both(params, statistics, pixels):
        trained = model.apply({"params": params}, pixels, True, mutable=["batch_stats"])
        return trained, model.apply({"params": params, **statistics}, pixels)

    (trained, found), evaluated = both(params, statistics, pixels)
    reference = Reference(params, config)
    expected = reference(pixels)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(trained, expected, atol=2e-5 * scale)
    assert len(reference.moments) == sum(1 for _ in convolutions(config, 8))
    for path, (mean, var) in reference.moments.items():
        own = Reference._at(found["batch_stats"], path)
        np.testing.assert_allclose(own["mean"], mean, atol=1e-5 * np.abs(mean).max())
        np.testing.assert_allclose(own["var"], var, rtol=1e-4)
    expected = Reference(params, config, statistics["batch_stats"])(pixels)
    np.testing.assert_allclose(evaluated, expected, atol=2e-5 * np.abs(expected).max())


def test_rows_of_a_group_know_nothing_of_others():
    """A batch of two groups is two batches; statistics are their mean."""
    config = dataclasses.replace(SMALL, batch_norm_group=2)
    pixels = np.concatenate([random_images("small")[:2], 255 - random_images("small", 5)[:2]])
    params = random_params(config)

    @jax.jit
    def run(pixels):
        return module_of(config).apply({"params": params}, pixels, True, mutable=["batch_stats"])

    logits, state = run(pixels)
    apart = [run(pixels[rows]) for rows in (np.s_[:2], np.s_[2:])]
    np.testing.assert_allclose(logits, np.concatenate([x for x, _ in apart]), rtol=1e-4, atol=1e-5)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(s for _, s in apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, mean)


def test_a_block_starts_as_the_identity():
    params = init_params(module_of(SMALL), jax.random.key(0))
    assert not np.any(params["stage1_block1"]["norm2"]["scale"]) and np.all(params["stage1_block1"]["norm1"]["scale"])
    plain = init_params(module_of(dataclasses.replace(SMALL, zero_init=False)), jax.random.key(0))
    assert np.all(plain["stage1_block1"]["norm2"]["scale"])


@pytest.mark.slow
def test_computing_blocks_again_changes_no_gradient():
    params, pixels = random_params(SMALL), random_images("small")

    def gradient(remat):
        model = module_of(SMALL, remat=remat)

        def loss(params):
            logits, _ = model.apply({"params": params}, pixels, True, mutable=["batch_stats"])
            return jnp.square(logits).sum()

        return jax.jit(jax.grad(loss))

    computed = {
        remat: str(jax.make_jaxpr(gradient(remat))(params)).count("conv_general_dilated[")
        for remat in ("none", "dots", "full")
    }
    assert computed["none"] == computed["dots"] < computed["full"]
    left, right = gradient("none")(params), gradient("full")(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), left, right)


@pytest.mark.parametrize(("stride", "window", "size"), [(1, 3, 8), (2, 3, 9), (2, 7, 16), (2, 1, 8)])
def test_kernels_have_float32_gradients_also_of_bfloat16_images(stride, window, size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, size, size + 1, 4)).astype(np.float32)
    kernel = rng.normal(size=(window, window, 4, 5)).astype(np.float32)

    def plain(x, kernel):
        padding, names = [(window // 2,) * 2] * 2, ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=names)

    def gradients(function, x):
        y, pullback = jax.vjp(function, x, kernel)
        return pullback(jnp.asarray(np.random.default_rng(1).normal(size=y.shape), x.dtype))

    for left, right in zip(gradients(functools.partial(convolve, stride), x), gradients(plain, x), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)
    rounded = gradients(functools.partial(convolve, stride), jnp.asarray(x, jnp.bfloat16))[1]
    np.testing.assert_allclose(rounded, right, atol=0.01 * np.abs(right).max())
    assert (rounded != rounded.astype(jnp.bfloat16)).mean() > 0.9, "sums were rounded"


def test_bfloat16_keeps_statistics_in_float32():
    model = module_of(SMALL, dtype=jnp.bfloat16)
    out = jax.eval_shape(
        lambda p, x: model.apply({"params": p}, x, True, mutable=["batch_stats"]),
        random_params(SMALL),
        random_images("small"),
    )
    assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": ()}, "blocks=[]: each stage needs a block"),
        ({"pixel_std": (0.0,)}, "pixel_std=[0.0] must be positive"),
        ({"pixel_mean": (0.1, 0.2)}, "pixel_mean has 2 entries for channels=3"),
        ({"batch_norm_momentum": 1.0}, "batch_norm_momentum=1.0 in [0, 1)"),
    ],
)
def test_says_what_is_wrong(fields, message):
    with pytest.raises(ValueError) as caught:
        ResNetConfig(**fields)
    assert message in str(caught.value)


def test_other_depths_have_no_name():
    with pytest.raises(ValueError, match="depth=51 is not one of 18, 34, 50, 101"):
        resnet_config(51)
