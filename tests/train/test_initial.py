"""A start from a classifier of images or from a model of images and texts; transformers' is in test_setup.py."""

import dataclasses
import json

import image_training_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import initial_params

from ml.checkpoint import Checkpointer
from ml.checkpoint.pretrained import save_workdir
from ml.config import to_dict
from ml.data import ImageDataConfig, ImageTextDataConfig, TokenizerConfig
from ml.data.tokenizer import Tokenizer
from ml.errors import UserError
from ml.models import ResNetConfig, TwoTowerConfig, ViTConfig, init_model_state, module_of, text_tower
from ml.models.huggingface import save_pretrained
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.parallel import MeshConfig
from ml.train.conadv import ATTACKED
from ml.train.config import EvalConfig, ExperimentConfig, TrainConfig
from ml.train.setup import make_parts, make_state
from ml.train.state import AVERAGED, RUNNING
from ml.train.workdir import Workdir

pytestmark = pytest.mark.usefixtures("quick_compilation")

RESNET = ResNetConfig(num_classes=10, blocks=(1,), bottleneck=False, width=8, channels=1, stem="small",
                      pixel_mean=(0.3,), pixel_std=(0.4,))  # fmt: skip
TOWERS = TwoTowerConfig(
    ViTConfig(image_size=8, patch_size=4, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, patch_bias=False,
              pre_norm=True),
    text_tower(vocab_size=320, num_layers=1, embed_dim=16, num_heads=2, max_length=16),
    features=8,
)  # fmt: skip


def start(model, data, tmp_path, **train):
    config = ExperimentConfig(
        model,
        data,
        OptimizerConfig("sgd", 0.1),
        ScheduleConfig(),
        TrainConfig(steps=20, batch_size=16, microbatches=1, remat="none", **train),
        EvalConfig(batch_size=16),
        mesh=MeshConfig(2, 4),
    )
    parts = make_parts(config, Workdir(tmp_path))
    with jax.set_mesh(parts.rules.mesh), Checkpointer(tmp_path / "new") as checkpointer:
        return make_state(parts, checkpointer)[0]


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), right)


@pytest.fixture
def classifier(tmp_path):
    """The folder of a run with a moving average, and what belongs to that."""
    rng, folder = np.random.default_rng(0), tmp_path / "donor"
    params = image_training_cases.initial_params(RESNET)
    shapes = jax.eval_shape(lambda: init_model_state(module_of(RESNET)))["batch_stats"]
    statistics = jax.tree.map(lambda x: rng.uniform(0.5, 2, x.shape).astype(np.float32), shapes)
    folder.mkdir()
    (folder / "experiment.json").write_text(json.dumps({"model": to_dict(RESNET), "train": {"ema": 0.9}}))
    model_state = {"batch_stats": jax.tree.map(np.zeros_like, statistics), "average_batch_stats": statistics}
    state = {"params": jax.tree.map(np.zeros_like, params), "ema": params, "model_state": model_state}
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(0, jax.tree.map(jnp.asarray, state), None, force=True)
    return folder, params, statistics


@pytest.mark.parametrize("adversarial", ["none", "concurrent"])
def test_a_classifier_starts_from_another_with_its_statistics(classifier, tmp_path, adversarial):
    folder, params, statistics = classifier
    state = start(RESNET, ImageDataConfig(), tmp_path, init_from=str(folder), ema=0.5, adversarial=adversarial)
    same((state.params, state.ema), (params, params))
    attacked = {ATTACKED} if adversarial == "concurrent" else set()
    assert state.model_state.keys() == {RUNNING, AVERAGED} | attacked
    for collection in state.model_state.values():
        same(collection, statistics)


def test_other_classes_get_a_layer_of_their_own(classifier, tmp_path):
    folder, params, statistics = classifier
    wider = dataclasses.replace(RESNET, num_classes=12)
    state = start(wider, ImageDataConfig(), tmp_path, init_from=str(folder))
    old, new = dict(params), dict(state.params)
    assert [tree.pop("kernel").shape[1] for tree in (old, new)] == [10, 12]
    assert [tree.pop("bias").shape for tree in (old, new)] == [(10,), (12,)]
    same((new, state.model_state["batch_stats"]), (old, statistics))


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (dataclasses.replace(RESNET, width=16), "donor", r"has width=8, but config\.model\.width=16; make them equal"),
        (RESNET, "nowhere", r"nowhere: has no experiment\.json; give the work directory of a run of configs/resnet"),
        (RESNET, "towers", r"towers: holds no image classifier"),
    ],
)
def test_another_classifier_is_refused(classifier, tmp_path, model, source, message):
    save_workdir(tmp_path / "towers", TOWERS, jax.tree.map(jnp.asarray, initial_params(TOWERS)))
    with pytest.raises(UserError, match=message):
        start(model, ImageDataConfig(), tmp_path, init_from=str(tmp_path / source))


def test_two_towers_start_from_a_clip(tmp_path):
    Tokenizer.train(["a photo of the number one and of two"] * 2, 320).save(tmp_path / "tokenizer")
    tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
    data = ImageTextDataConfig(
        image_size=8, text_length=8, heldout_fraction=0.2, tokenizer=TokenizerConfig(path=str(tokenizer))
    )
    params = initial_params(TOWERS)
    save_workdir(tmp_path / "run", TOWERS, jax.tree.map(jnp.asarray, params))
    save_pretrained(tmp_path / "clip", TOWERS, params, tokenizer)
    same(start(TOWERS, data, tmp_path, init_from=str(tmp_path / "clip")).params, params)
    with pytest.raises(UserError, match=r"has features=8, but config\.model\.features=4; make them equal"):
        start(dataclasses.replace(TOWERS, features=4), data, tmp_path, init_from=str(tmp_path / "run"))
    untold = dataclasses.replace(data, tokenizer=TokenizerConfig(vocab_size=320))
    with pytest.raises(UserError, match=r"needs its own tokenizer: set config\.data\.tokenizer\.path too"):
        start(TOWERS, untold, tmp_path, init_from=str(tmp_path / "run"))
