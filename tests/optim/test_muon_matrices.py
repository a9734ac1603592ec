import jax
import numpy as np

from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.optim.muon import matrix_dimensions


def test_matrices_are_read_off_the_axes(axes):
    numbers = matrix_dimensions(axes)
    assert numbers["layers"]["attention"]["query"]["kernel"] == ((1,), (2, 3))
    out = {"layers": {"out": {"kernel": ("layers", "heads", "head_dim", "embed")}}}
    assert matrix_dimensions(out)["layers"]["out"]["kernel"] == ((1, 2), (3,))
    assert numbers["layers"]["moe"]["up"]["kernel"] == ((2,), (3,))
    assert matrix_dimensions({"mlp": {"down": {"kernel": ("mlp", "embed")}}})["mlp"]["down"]["kernel"] == ((0,), (1,))
    # Tables, classifiers over a discrete set, vectors and biases of any rank go to Adam.
    for node in (axes["embed"], axes["unembed"], axes["layers"]["moe"]["router"], axes["layers"]["attention_norm"]):
        assert jax.tree.leaves(matrix_dimensions(node)) == []
    assert numbers["layers"]["attention"]["query"]["bias"] is None


def test_every_layer_and_expert_gets_an_orthogonal_update(axes, params, gradients):
    config = OptimizerConfig("muon", 1.0, options={"consistent_rms": None, "ns_steps": 12})
    transform, _ = make_optimizer(config, ScheduleConfig(kind="constant"), total_steps=5, batch_size=8, axes=axes)
    updates, _ = jax.jit(transform.update)(gradients[0], transform.init(params), params)
    query = np.reshape(updates["layers"]["attention"]["query"]["kernel"], (2, 8, 8))
    up = np.reshape(updates["layers"]["moe"]["up"]["kernel"], (4, 8, 8))
    singular = np.linalg.svd(np.concatenate([query, up]), compute_uv=False)
    # The quintic's coefficients leave singular values between about 0.7 and 1.2.
    assert singular.min() > 0.6 and singular.max() < 1.3
    # Adam's first step on the rest is the sign of the gradient.
    for name in ("embed", "unembed", "final_norm"):
        leaf, gradient = jax.tree.leaves(updates[name])[0], jax.tree.leaves(gradients[0][name])[0]
        np.testing.assert_array_equal(np.sign(leaf), -np.sign(gradient))
