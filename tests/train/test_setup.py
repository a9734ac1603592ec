"""Everything before the first step: what does not fit together is told, and a start from another model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import experiment, initial_params, write_corpus

from ml.checkpoint import Checkpointer
from ml.checkpoint.pretrained import save_workdir
from ml.errors import UserError
from ml.models import MoEConfig
from ml.parallel import MeshConfig, Rules
from ml.train.setup import check_fit, make_model, make_parts, make_state
from ml.train.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


@pytest.fixture
def parts(corpus, tmp_path):
    def make(**changes):
        config = experiment(corpus, data__cache_dir=str(corpus.parent / "cache"), train__microbatches=1, **changes)
        return make_parts(config, Workdir(tmp_path))

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__batch_size": 12}, r"config.train.batch_size=12 .* 8 batch shards.*; use a multiple of 8"),
        ({"train__batch_size": 16, "mesh__data": 3}, r"config.mesh: data=3 .*8 devices"),
        ({"eval__batch_size": 9}, r"config.eval.batch_size=9 is not a multiple of 8 batch shards"),
        ({"model__vocab_size": 256}, r"model.vocab_size=256 is too small: .* set model.vocab_size="),
        ({"data__sequence_length": 64}, r"config.data.sequence_length=64 .*config.model.max_length=32"),
        ({"mesh__data": 1, "mesh__tensor": 8}, r"config.mesh.tensor=8 does not divide the model's .* choose a divisor"),
    ],
)
def test_what_does_not_fit_is_named(parts, changes, message):
    with pytest.raises(UserError, match=message) as error:
        made = parts(**changes)
        with jax.set_mesh(made.rules.mesh), Checkpointer(made.prepared.config.cache_dir) as checkpointer:
            make_state(made, checkpointer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "dtype"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_activations_are_float32_on_a_cpu_unless_told_otherwise(corpus, name, dtype):
    model = make_model(experiment(corpus, train__dtype=name), Rules.make(MeshConfig()))
    assert model.dtype == jnp.dtype(dtype)


@pytest.fixture
def donor(parts, tmp_path):
    """A model in a folder, as `scripts/convert.py` writes it, that fits the experiment."""
    made = parts()
    tokenizer = Workdir(tmp_path).tokenizer
    params = initial_params(made.config.model)
    save_workdir(tmp_path / "donor", made.config.model, jax.tree.map(jnp.asarray, params), tokenizer)
    return {"train__init_from": str(tmp_path / "donor"), "data__tokenizer__path": str(tokenizer)}, params


def start(parts, tmp_path):
    with jax.set_mesh(parts.rules.mesh), Checkpointer(tmp_path / "new") as checkpointer:
        return make_state(parts, checkpointer)


def test_a_run_starts_from_another_models_parameters(parts, donor, tmp_path):
    changes, params = donor
    state, recorded = start(parts(**changes, mesh__data=2, mesh__fsdp=4), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), params)
    kernel = state.params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 4
    assert (recorded, int(state.step)) == ({}, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_layers": 2}, "has num_layers=1, but config.model.num_layers=2; make them equal"),
        ({"model__tie_embeddings": False}, "has tie_embeddings=True, but config.model.tie_embeddings=False"),
        ({"model__embed_dim": 24, "mesh__fsdp": 8, "mesh__data": 1}, "has embed_dim=16, but config.model.embed_dim=24"),
        ({"train__init_from": "nowhere"}, "nowhere: no such folder"),
        ({"data__tokenizer__path": ""}, "needs its own tokenizer: set config.data.tokenizer.path"),
    ],
)
def test_another_architecture_is_refused(parts, donor, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        start(parts(**donor[0] | changes), tmp_path)


def test_the_longest_sequence_may_differ_unless_positions_are_learned(parts, donor, tmp_path):
    changes = donor[0] | {"model__max_length": 64}
    assert start(parts(**changes), tmp_path)[1] == {}
    learned = dataclasses.replace(parts().config.model, position_embedding="learned")
    save_workdir(tmp_path / "learned", learned, jax.tree.map(jnp.asarray, initial_params(learned)))
    changes |= {"model__position_embedding": "learned", "train__init_from": str(tmp_path / "learned")}
    with pytest.raises(UserError, match=r"has max_length=32, but config.model.max_length=64"):
        start(parts(**changes), tmp_path)


def test_a_model_without_a_run_is_not_resumed(parts, tmp_path):
    made = parts()
    with jax.set_mesh(made.rules.mesh), Checkpointer(tmp_path) as checkpointer:
        state, _ = make_state(made, checkpointer)
        checkpointer.save(1, state, None, force=True)
        checkpointer.wait()
        with pytest.raises(UserError, match=r"holds a model, not a run; name its folder in config.train.init_from"):
            make_state(made, checkpointer)


def test_how_experts_are_trained_may_differ_but_not_whether_they_have_a_bias(parts, donor, tmp_path):
    model = dataclasses.replace(parts().config.model, moe=MoEConfig(4, 2, 8))
    save_workdir(tmp_path / "experts", model, jax.tree.map(jnp.asarray, initial_params(model)))
    changes = donor[0] | {"train__init_from": str(tmp_path / "experts")}
    other = {"num_experts": 4, "top_k": 2, "mlp_dim": 8, "aux_loss_weight": 0.5, "balance_over": "batch"}
    assert start(parts(**changes, model__moe=other), tmp_path)[1] == {}
    with pytest.raises(UserError, match=r"has moe=.*bias_update_rate': 0.0.* but .*bias_update_rate': 0.001"):
        start(parts(**changes, model__moe=other | {"bias_update_rate": 0.001}), tmp_path)


def test_a_dense_model_has_no_experts_to_spread(parts):
    with pytest.raises(UserError, match=r"config.mesh.expert=2, but the model has no experts"):
        parts(mesh__expert=2)


# What the mesh cannot cut, on eight devices; the model has 1 layer, 2 heads, rows of 32 tokens, 8 of them in 2 parts.
UNFIT = {
    "no such number of devices": ({"mesh__stage": 3}, "config.mesh.stage=3 must be one of 1, 2, 4, 8"),
    "batch": ({"train__batch_size": 4}, r"batch_size=4 is not a multiple of microbatches=2 x 8 batch shards.*16"),
    "row": (
        {"mesh__data": 1, "mesh__sequence": 8, "data__sequence_length": 24},
        r"sequence_length=24 does not divide into the 16 chunks that config.mesh.sequence=8.*such as 16",
    ),
    "experts of a dense model": (
        {"mesh__data": 1, "mesh__expert": 4, "mesh__tensor": 2},
        "config.mesh.expert=4, but the model has no experts; set config.mesh.expert=1",
    ),
    "layers": (
        {"mesh__data": 2, "mesh__stage": 4},
        r"num_layers=1 is not a multiple of config.mesh.stage=4 x config.train.pipeline_chunks=1; choose stage from 1",
    ),
    "microbatches of an interleaved pipeline": (
        {
            "mesh__data": 2,
            "mesh__stage": 4,
            "model__num_layers": 8,
            "train__pipeline_chunks": 2,
        },
        r"microbatches=2 is not a multiple of config.mesh.stage=4.*use 4 or 8, or pipeline_chunks=1",
    ),
    "heads": (
        {"mesh__data": 2, "mesh__tensor": 4},
        "config.mesh.tensor=4 does not divide the model's (kv_)?heads axis of 2; choose a divisor of 2",
    ),
    "width": (
        {"train__microbatches": 1, "mesh__layout": "zero3", "model__embed_dim": 20},
        "config.mesh.data=8 does not divide the model's embed axis of 20; choose a divisor of 20",
    ),
}


@pytest.mark.parametrize("changes", UNFIT, ids=UNFIT)
def test_what_the_mesh_cannot_cut_is_named_with_a_valid_choice(corpus, changes):
    settings, message = UNFIT[changes]
    with pytest.raises(UserError, match=message):
        config = experiment(corpus, **settings)
        check_fit(config, Rules.make(config.mesh))
