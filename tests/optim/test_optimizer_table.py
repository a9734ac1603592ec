"""What must hold for every optimizer in the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ml.config import build, to_dict
from ml.errors import UserError
from ml.optim import OPTIMIZERS, OptimizerConfig, ScheduleConfig, eval_params, make_optimizer

# Learning rate and options under which each optimizer moves visibly within a few steps on a tiny problem.
SETTINGS = {
    "lamb": (0.1, {}),
    "lars": (0.1, {}),
    "lars_2017": (0.1, {"trust_coefficient": 0.2}),
    "adamw": (0.1, {}),
    "nadamw": (0.1, {}),
    "sgd": (0.05, {}),
    "lion": (0.05, {}),
    "adafactor": (0.1, {"min_dim_size_to_factor": 2, "momentum": 0.9}),
    "adafactorw": (0.1, {"min_dim_size_to_factor": 2, "mu_dtype": "float32"}),
    "sm3": (0.3, {}),
    "muon": (0.3, {}),
    "schedule_free_adamw": (0.2, {}),
    "schedule_free_sgd": (0.5, {}),
    "dadapt_adamw": (1.0, {"initial_estimate": 1e-2}),
    "prodigy": (1.0, {"initial_estimate": 1e-2}),
    "dog": (1.0, {"initial_distance": 1e-2}),
    "dowg": (1.0, {"initial_squared_distance": 1.0}),
    "mechanic_adamw": (1.0, {"initial_scale": 1e-1}),
    "cocob": (1.0, {}),
}

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def config_for(name, **common):
    learning_rate, options = SETTINGS[name]
    return OptimizerConfig(name=name, learning_rate=learning_rate, options=options, **common)


def transform_for(config, axes, schedule=ScheduleConfig(kind="constant")):
    return make_optimizer(config, schedule, total_steps=100, batch_size=8, axes=axes)[0]


class Trainer:
    """Compiled ``init`` and ``step``; the step takes gradients and donates parameters and state, as in training."""

    def __init__(self, transform):
        def step(params, state, gradients):
            updates, state = transform.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        self.transform = transform
        self.init = jax.jit(transform.init)
        self.step = jax.jit(step, donate_argnums=(0, 1))

    def run(self, params, gradients):
        params = jax.tree.map(jnp.array, params)
        state = self.init(params)
        for g in gradients:
            params, state = self.step(params, state, g)
        return params, state


def train(transform, params, gradients):
    return Trainer(transform).run(params, gradients)


@pytest.fixture(scope="module")
def trainer_for(axes):
    """name -> the trainer that most tests share: decay, clipping, and a warm-up whose first rate is exactly 0."""
    schedule = ScheduleConfig(kind="constant", warmup_steps=2)

    @functools.cache
    def trainer(name):
        return Trainer(transform_for(config_for(name, weight_decay=0.1, clip_norm=20.0), axes, schedule))

    return trainer


def unstack(tree, axes):
    """Makes every layer and expert a leaf of its own; returns the tree and its axes."""
    if isinstance(axes, dict):
        pairs = {key: unstack(tree[key], axes[key]) for key in axes}
    elif axes[0] in ("layers", "expert"):
        pairs = {str(i): unstack(part, axes[1:]) for i, part in enumerate(tree)}
    else:
        return tree, axes
    return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}


@pytest.mark.sweep("adafactor", "lamb", "muon", "sm3", "schedule_free_adamw")
@every_optimizer
def test_scanned_equals_unscanned(name, axes, params, gradients, trainer_for):
    scanned, _ = trainer_for(name).run(params, gradients)
    flat_params, flat_axes = unstack(params, axes)
    schedule = ScheduleConfig(kind="constant", warmup_steps=2)
    transform = transform_for(config_for(name, weight_decay=0.1, clip_norm=20.0), flat_axes, schedule)
    unscanned, _ = train(transform, flat_params, [unstack(g, axes)[0] for g in gradients])
    for (path, a), b, x in zip(
        jax.tree_util.tree_leaves_with_path(unstack(scanned, axes)[0]),
        jax.tree.leaves(unscanned),
        jax.tree.leaves(flat_params),
        strict=True,
    ):
        where, size = jax.tree_util.keystr(path), np.max(np.abs(x))
        assert np.max(np.abs(b - x)) > 1e-4 * size, f"{where} did not move"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(size, np.max(np.abs(b))), err_msg=where)


@every_optimizer
def test_decreases_least_squares_from_a_warm_up_that_starts_at_zero(name, params, trainer_for):
    targets = jax.tree.map(lambda x: 0.5 * x + 0.1, params)

    def loss(params):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: np.sum(np.square(x - y)), params, targets)))

    trainer = trainer_for(name)
    trained, state = trainer.run(params, [])
    for step in range(40):
        gradients = jax.tree.map(lambda x, y: np.asarray(2 * (x - y)), trained, targets)
        trained, state = trainer.step(trained, state, gradients)
        if step == 0:
            assert all(np.isfinite(x).all() for x in jax.tree.leaves((trained, state)))
    assert loss(eval_params(config_for(name), state, trained)) < 0.5 * loss(params)


@pytest.mark.sweep("adafactor", "adamw", "lamb", "muon", "mechanic_adamw", "schedule_free_adamw")
@every_optimizer
def test_biases_and_scales_do_not_decay(name, axes, params, gradients, trainer_for):
    gradients = [jax.tree.map(lambda g: 0.1 * g, g) for g in gradients[:3]]  # below the clipping norm
    decayed, _ = trainer_for(name).run(params, gradients)
    schedule = ScheduleConfig(kind="constant", warmup_steps=2)
    plain, _ = train(transform_for(config_for(name), axes, schedule), params, gradients)
    tree_wide = name in ("dog", "dowg", "mechanic_adamw")  # the one step size of all leaves feels the decay
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(decayed), strict=True):
        where = jax.tree_util.keystr(path)
        if path[-1].key not in ("bias", "scale"):
            assert np.max(np.abs(a - b)) > 1e-6, where
        elif not tree_wide:
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=where)


@pytest.mark.parametrize("name", ["dog", "dowg", "mechanic_adamw"])
def test_excluded_leaves_keep_their_direction_under_a_common_step_size(name, axes, params, gradients):
    moves = []
    for decay in (0.0, 0.5):
        start = jax.tree.map(jnp.array, params)
        after, _ = train(transform_for(config_for(name, weight_decay=decay), axes), params, gradients[:1])
        moves.append(np.float64(after["final_norm"]["scale"]) - np.float64(start["final_norm"]["scale"]))
    cosine = np.vdot(*moves) / (np.linalg.norm(moves[0]) * np.linalg.norm(moves[1]))
    assert cosine > 1 - 1e-6


@pytest.mark.parametrize("name", ["dadapt_adamw", "prodigy"])
def test_masked_decay_equals_optax_where_nothing_is_excluded(name, axes, params, gradients):
    config = OptimizerConfig(name, 1.0, weight_decay=0.3, no_decay=(), options={"initial_estimate": 1e-2})
    actual, _ = train(transform_for(config, axes), params, gradients)
    stock = getattr(optax.contrib, name)(1.0, estim_lr0=1e-2, weight_decay=0.3)
    expected, _ = train(optax.GradientTransformation(
        lambda x: stock.init(jax.tree.map(jnp.copy, x)), stock.update), params, gradients)  # fmt: skip
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), actual, expected)


@pytest.fixture(scope="module")
def mesh():
    assert len(jax.devices()) >= 8, "this module needs 8 (emulated) devices; see conftest.py"
    return jax.make_mesh((4, 2), ("data", "tensor"), devices=jax.devices()[:8])


MESH_AXES = {"vocab": "tensor", "embed": "data", "heads": "tensor", "expert": "tensor"}


@pytest.mark.sweep("adafactor", "lamb", "muon", "sm3", "prodigy")
@every_optimizer
def test_same_update_when_sharded_and_state_keeps_its_type(name, axes, params, gradients, mesh, trainer_for):
    """Sharded over 4x2 devices with explicit axes; the state's types (sharding included) must not drift."""
    expected, _ = trainer_for(name).run(params, gradients[:3])
    specs = jax.tree.map(lambda names: P(*map(MESH_AXES.get, names)), axes, is_leaf=lambda x: isinstance(x, tuple))

    def shard(tree):
        return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)

    with jax.set_mesh(mesh):
        sharded = shard(params)
        initial = trainer_for(name).init(sharded)
        actual, state = trainer_for(name).run(sharded, [shard(g) for g in gradients[:3]])
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, initial)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))
    parameter_sized = [x for x in jax.tree.leaves(state) if x.size >= params["unembed"]["kernel"].size]
    assert not any(x.sharding.is_fully_replicated for x in parameter_sized)


def test_every_state_survives_a_checkpoint(params, gradients, tmp_path, trainer_for):
    states = {name: trainer_for(name).run(params, gradients[:2])[1] for name in OPTIMIZERS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        assert isinstance(leaf, jax.Array), f"{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not an array"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        template = {name: jax.eval_shape(trainer_for(name).transform.init, params) for name in OPTIMIZERS}
        restored = checkpointer.restore(tmp_path / "states", template)
    assert jax.tree.structure(restored) == jax.tree.structure(states)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(states), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@every_optimizer
def test_a_state_made_outside_of_jit_shares_no_buffer_with_the_parameters(name, params, trainer_for):
    """A step that donates both would otherwise be refused."""
    params = jax.tree.map(jnp.array, params)
    with jax.disable_jit():
        state = trainer_for(name).transform.init(params)
    own = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert own.isdisjoint(x.unsafe_buffer_pointer() for x in jax.tree.leaves(state))


def test_an_optimizer_may_own_a_part_of_the_tree(axes, params, gradients):
    """Adapters and frozen parameters: gradients for a subtree, axes for all of it."""
    part = {"layers": {"attention": params["layers"]["attention"]}}
    transform = transform_for(config_for("lamb"), axes)
    moved, _ = train(transform, part, [{"layers": {"attention": g["layers"]["attention"]}} for g in gradients])
    whole, _ = train(transform, params, gradients)
    jax.tree.map(np.testing.assert_array_equal, moved["layers"]["attention"], whole["layers"]["attention"])


def test_eval_params_are_the_average_for_schedule_free_and_the_parameters_otherwise(axes, params, gradients):
    config = OptimizerConfig("schedule_free_sgd", 0.1, clip_norm=1e6)
    trained, state = train(transform_for(config, axes), params, gradients)
    # At a constant rate x is the plain mean of the SGD iterates z_1..z_t.
    z, iterates = np.float64(params["unembed"]["kernel"]), []
    for g in gradients:
        z = z - 0.1 * g["unembed"]["kernel"]
        iterates.append(z)
    average = eval_params(config, state, trained)["unembed"]["kernel"]
    np.testing.assert_allclose(average, np.mean(iterates, axis=0), rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(average - trained["unembed"]["kernel"])) > 1e-3
    trained, state = train(transform_for(config_for("lamb"), axes), params, gradients)
    assert eval_params(config_for("lamb"), state, trained) is trained


def test_schedule_reaches_the_update(axes, params, gradients):
    config = OptimizerConfig("sgd", 0.1, options={"momentum": 0.0})
    schedule = ScheduleConfig(kind="constant", batch_scaling="sqrt", base_batch_size=2)
    transform, rate = make_optimizer(config, schedule, total_steps=10, batch_size=8, axes=axes)
    updates, _ = transform.update(gradients[0], transform.init(params), params)
    assert float(rate(3)) == pytest.approx(0.2)
    np.testing.assert_allclose(updates["unembed"]["kernel"], -0.2 * gradients[0]["unembed"]["kernel"], rtol=1e-6)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"name": "lamp", "learning_rate": 1.0}, r"optimizer\.name.*'lamp'.*did you mean 'lamb'\?"),
        (
            {"name": "adamw", "learning_rate": 1.0, "options": {"bb1": 0.9}},
            r"optimizer\.options\.bb1.*did you mean 'b1'",
        ),
        ({"name": "adamw", "learning_rate": 1.0, "options": {"ratio_max": 1.0}}, r"ratio_max: no such key; valid: b1"),
        (
            {"name": "lamb", "learning_rate": 1.0, "options": {"bias_correction": 1}},
            r"bias_correction: expected true or",
        ),
        ({"name": "lamb", "learning_rate": 1.0, "options": {"mu_dtype": "bf16"}}, r"mu_dtype.*did you mean 'bfloat16'"),
        ({"name": "lamb", "learning_rate": 1.0, "weight_decy": 1.0}, r"did you mean 'weight_decay'"),
        ({"name": "lamb", "learning_rate": 0.0}, r"learning_rate=0.0 must be positive"),
        ({"name": "lamb", "learning_rate": 1.0, "clip_norm": -1.0}, r"must not be negative"),
    ],
)
def test_bad_settings_name_the_nearest(setting, message):
    with pytest.raises(UserError, match=message):
        build(OptimizerConfig, setting, "optimizer")


def test_configuration_survives_a_round_trip():
    config = OptimizerConfig("lamb", 1e-3, options={"b2": 0.99, "no_adaptation": ["bias"], "eps": 1})
    assert build(OptimizerConfig, to_dict(config), "optimizer") == config
