"""`ml/studies/conadv.py`: the verdict follows the accuracies; and the program that the digits' studies run."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ml.data import next_name
from ml.studies.conadv import SETTINGS, Found, judge, study
from ml.studies.digits_training import Reading, digits, digits_model

SETTING = SETTINGS["cpu"]


def found(none=0.95, noise=0.955, sequential=0.965, concurrent=0.966):
    means = {"none": none, "noise": noise, "sequential": sequential, "concurrent": concurrent}
    wobble = (0.0, 0.001, -0.001, 0.0005, -0.0005)
    accuracies = {name: tuple(mean + w for w in wobble) for name, mean in means.items()}
    return Found(0.02, {0.02: 0.1}, 0.01, accuracies["none"], accuracies, dict.fromkeys(means, 0.01))


def test_the_claim_holds_against_clean_and_control_or_not_at_all():
    outcome = judge(SETTING, found())
    assert outcome.holds and outcome.baseline.name == "random signs" and outcome.ours.name == "ConAdv"
    outcome = judge(SETTING, found(noise=0.97))
    assert not outcome.holds
    assert outcome.reason == "training on images moved at random is as accurate or more (0.970 against 0.966)"
    assert judge(SETTING, found(concurrent=0.95)).reason.startswith("training on clean images is as accurate or more")


def test_a_reading_is_whole_epochs_and_sees_the_next_batch():
    reading = Reading(100, 3, 250)
    batches, (train, heldout) = reading.batches(7), digits(250)
    assert reading.steps == 7 and batches["images"].shape == (7, 1, 100, 8, 8, 1)
    shown = batches["images"].reshape(700, -1)[:250]
    assert sorted(map(bytes, shown)) == sorted(map(bytes, train["images"].reshape(250, -1)))
    np.testing.assert_array_equal(batches[next_name("images")][:-1], batches["images"][1:])
    known = {bytes(image) for image in digits()[0]["images"]}
    assert heldout["loss_mask"].all() and len(known) > 1300


@pytest.mark.slow
def test_a_whole_study_in_small():
    small = dataclasses.replace(
        SETTING, model=digits_model(4, (1,)), epochs=6, train_images=256, large=128, seeds=(1, 2, 3), tuning_seeds=(11,)
    )
    outcome = study(small)
    assert set(outcome.details["accuracy"]) == {"clean", "random signs", "DisAdv", "ConAdv"}
    assert all(0.1 < float(jnp.mean(jnp.array(x))) < 1 for x in outcome.details["accuracy"].values())
