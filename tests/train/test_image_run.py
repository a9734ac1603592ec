"""Runs on images: digits are learned, a run goes on bit for bit, and what does not fit together is told."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from ml.checkpoint import restore_params
from ml.config import build
from ml.errors import UserError
from ml.parallel import MeshConfig, Rules
from ml.train.config import ExperimentConfig
from ml.train.heldout import heldout_of_run
from ml.train.loop import train
from ml.train.setup import check_fit
from scripts import config_flag

pytestmark = pytest.mark.usefixtures("quick_compilation")
DIGITS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "resnet" / "digits.py"


def digits(**changes):
    config = config_flag.load_file(str(DIGITS))
    config.model.width, config.model.blocks = 4, (1, 1)
    small = {"train__steps": 6, "train__ema": 0.5, "checkpoint__every": 3, "eval__every": 3, "eval__batches": 2}
    with config.unlocked(), config.ignore_type():
        for name, value in (small | {"mesh__data": 1, "mesh__fsdp": 8} | changes).items():
            group = config
            for one in name.split("__")[:-1]:
                group = group[one]
            group[name.split("__")[-1]] = value
    return build(ExperimentConfig, config.to_dict())


def outcome(workdir, step):
    parts = ["params", "ema", "opt_state", "model_state"]
    if "adversarial" in (workdir / "metrics.jsonl").read_text():
        parts.append("carried")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [restore_params(workdir, step, subtree=part) for part in parts], [
        {k: v for k, v in row.items() if k != "images_per_second"} for row in rows
    ]


@pytest.mark.parametrize("adversarial", ["concurrent", pytest.param("none", marks=pytest.mark.slow)])
def test_a_run_that_is_cut_ends_where_a_whole_one_does(tmp_path, adversarial):
    # The rate does not depend on how many steps are still to come.
    same = {"schedule__kind": "constant", "schedule__warmup_fraction": 0.0, "train__adversarial": adversarial}
    whole = train(digits(**same), tmp_path / "whole")
    train(digits(**same, train__steps=3), tmp_path / "cut")
    resumed = train(digits(**same), tmp_path / "cut")
    left, right = outcome(tmp_path / "whole", 6), outcome(tmp_path / "cut", 6)
    jax.tree.map(np.testing.assert_array_equal, left[0], right[0])
    assert left[1] == right[1]
    assert {"images", "images_seen", "accuracy", "broken_seen", "eval_accuracy"} <= right[1][-1].keys()
    assert (whole.tokens, resumed.unit, resumed.broken) == (6 * 64, "images", 0)
    assert whole.heldout.scalars == resumed.heldout.scalars and whole.heldout.tokens > 300
    again = heldout_of_run(tmp_path / "cut", batch_size=128)
    np.testing.assert_allclose(again.per_token, whole.heldout.per_token, rtol=1e-5)
    assert (again.more, again.tokens) == (whole.heldout.more, whole.heldout.tokens)
    assert json.loads((tmp_path / "whole" / "classes.json").read_text()) == list("0123456789")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__num_classes": 9}, r"config\.model\.num_classes=9, but config\.data has 10 classes; set it to 10"),
        ({"model__channels": 3}, r"config\.data\.channels=1, but config\.model\.channels=3"),
        ({"model__kind": "resnett"}, r"config\.model\.kind: 'resnett' is not one of 'resnet'"),
        ({"model__widht": 8}, r"config\.model\.widht: no such key; did you mean 'width'\?"),
        ({"train__dropout": 0.1}, r"config\.train\.dropout=0\.1 is not for image models; set it to 0\.0"),
        ({"train__remat": "offload"}, r"config\.train\.remat=offload is for transformers"),
        ({"model__batch_norm_group": 7}, r"config\.model\.batch_norm_group=7 does not divide the 64 rows"),
        ({"data": {"sequence_length": 8}}, r"config\.data\.kind=None is not what config\.model learns from"),
        ({"train__batch_size": 60}, r"config\.train\.batch_size=60 is not a multiple of .* use a multiple of 8"),
        ({"mesh__fsdp": 4, "mesh__tensor": 2}, r"config\.mesh\.tensor=2 cuts no image model"),
        ({"model__batch_norm_group": 16}, r"batch_norm_group=16 does not divide the 8 rows of a microbatch on each"),
        ({"schedule__warmup_fraction": 0.0, "schedule__warmup_steps": 9}, r"warmup_steps=9"),
        ({"data__source": "folder", "data__path": "no/where"}, r"config\.data\.path=no/where: does not exist"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train(digits(**changes), tmp_path)
    assert "\n" not in str(error.value)


def test_text_is_not_for_networks_nor_images_for_transformers():
    from training_cases import MODELS

    config = digits()
    with pytest.raises(UserError, match=r"config\.data\.kind='images' is not what config\.model learns from"):
        dataclasses.replace(config, model=MODELS["dense"])


def test_any_mesh_of_replicas_is_accepted():
    check_fit(digits(), Rules.make(MeshConfig(2, 4)))
