"""Advice: each number is its source's, the flags make a valid experiment, and what is doubtful is said."""

import dataclasses
import math

import pytest
from planned_cases import experiment

from ml.errors import UserError
from ml.optim import OptimizerConfig, ScheduleConfig, StageConfig, make_schedule
from ml.plan.advice import advise
from ml.plan.memory import abstract_rules
from ml.plan.mends import changed
from ml.plan.planner import MARGIN
from ml.plan.probe import NoiseScale
from ml.plan.step_law import STEP_LAW, non_embedding_parameters
from ml.plan.topology import parse
from ml.train.setup import check_fit

# Within Step Law's range: 453 million parameters.
LARGE = {"num_layers": 16, "embed_dim": 1536, "num_heads": 12, "num_kv_heads": 12, "mlp_dim": 4096, "max_length": 2048}
NOISE = NoiseScale(tokens=20_000.0, low=15_000.0, high=26_000.0, steps=100, batch_tokens=4096.0, loss=4.5)


def test_within_its_range_step_law_decides():
    config, tokens = experiment(LARGE, microbatches=4), 50 * 10**9
    advice = advise(config, tokens)
    parameters = non_embedding_parameters(config.model)
    law = STEP_LAW.batch_tokens.at(tokens)
    batch, steps = advice.number("global batch"), advice.number("steps")
    assert batch.value == advice.overrides["train.batch_size"] and "Step Law" in batch.source
    assert batch.value * 2048 == pytest.approx(law.value, rel=0.01)
    assert batch.interval == pytest.approx((law.low / 2048, law.high / 2048))
    assert steps.value == tokens // (batch.value * 2048)
    rate = advice.number("peak learning rate")
    assert rate.value == STEP_LAW.peak_lr.at(parameters, tokens).value and "1.79 N^-0.713" in rate.source
    assert advice.number("warm-up").value == 2000
    (note,) = advice.notes
    assert "AdamW" in note and "1e-05" not in note and "final learning rate of 1e-5" in note


def test_the_flags_make_an_experiment_that_trains_as_advised():
    advice = advise(experiment(LARGE), 50 * 10**9)
    config = changed(experiment(LARGE), advice.overrides)
    assert f"--config.train.batch_size={config.train.batch_size} " in advice.flags
    assert config.train.batch_size % config.train.microbatches == 0
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        total_steps=config.train.steps,
        batch_size=config.train.batch_size,
    )
    peak = advice.number("peak learning rate").value
    assert float(schedule(2000)) == pytest.approx(peak, rel=0.01)
    assert float(schedule(config.train.steps)) == pytest.approx(1e-5, rel=0.01)


def test_beyond_its_range_the_measurement_decides_and_the_rate_follows_the_batch():
    config, tokens = experiment(), 100_000_000
    unmeasured = advise(config, tokens)
    assert any("tokens=1e+08 is outside of 4e+09 to 1e+11" in note for note in unmeasured.notes)
    assert "--measure" in unmeasured.number("global batch").source

    advice = advise(config, tokens, noise=NOISE)
    batch = advice.number("global batch")
    assert batch.value * 256 == pytest.approx(20_000, rel=0.1) and "noise scale, measured" in batch.source
    assert batch.interval == pytest.approx((15_000 / 256, 26_000 / 256))
    law = STEP_LAW.batch_tokens.at(tokens).value
    rate = STEP_LAW.peak_lr.at(non_embedding_parameters(config.model), tokens).value
    expected = rate * math.sqrt(batch.value * 256 / law)
    assert advice.number("peak learning rate").value == pytest.approx(expected)
    over = batch.value * 256 / 20_000
    assert advice.number("tokens over the fewest").value == pytest.approx(100 * over)
    assert advice.number("steps over the fewest").value == pytest.approx(100 / over)


def test_within_the_range_a_measurement_far_off_is_said():
    notes = advise(experiment(LARGE), 50 * 10**9, noise=NOISE).notes
    assert any("measured after 100 steps, 20,000 tokens, is far from Step Law's" in note for note in notes)
    near = dataclasses.replace(NOISE, tokens=9e5)
    assert len(advise(experiment(LARGE), 50 * 10**9, noise=near).notes) == 1


def test_a_large_noise_scale_leaves_steps_to_train():
    advice = advise(experiment(), 1_000_000, noise=dataclasses.replace(NOISE, tokens=1e6))
    assert advice.number("steps").value >= 50 and any("it was cut" in note for note in advice.notes)


def other(name, schedule, rate=0.02):
    return dataclasses.replace(experiment(), optimizer=OptimizerConfig(name, rate), schedule=schedule)


def test_other_optimizers_keep_their_own_rate_scaled_with_the_batch():
    warm = ScheduleConfig(warmup_fraction=0.1)  # of 1000 steps, at 16 sequences
    root = math.sqrt(64 / 16)
    advice = advise(other("lamb", warm), 10**9, global_batch=64)
    assert advice.number("peak learning rate").value == pytest.approx(0.02 * root)
    assert advice.overrides["optimizer.learning_rate"] == pytest.approx(0.02 * root)
    assert advice.number("warm-up").value == 100 and advice.overrides["schedule.warmup_fraction"] == 0
    assert "schedule.kind" not in advice.overrides
    assert any("AdamW's: for lamb its batch is a guide" in note for note in advice.notes)
    assert advise(other("sgd", warm), 10**9, global_batch=64).number("peak learning rate").value == pytest.approx(0.08)
    assert "optimizer.learning_rate" not in advise(other("prodigy", warm, 1.0), 10**9, global_batch=64).overrides
    scaled = ScheduleConfig(batch_scaling="sqrt", base_batch_size=4)
    advice = advise(other("lamb", scaled), 10**9, global_batch=64)
    assert advice.number("peak learning rate").value == pytest.approx(0.02 * 4)
    assert "optimizer.learning_rate" not in advice.overrides, "the schedule scales it by itself"
    few = advise(other("lamb", warm), 64 * 256 * 60, global_batch=64)
    assert few.number("warm-up").value == 12


def test_the_split_here_keeps_the_rows_of_a_microbatch():
    config = experiment(microbatches=4)  # of 16 sequences
    advice = advise(config, 10**9, global_batch=64, batch_shards=4)
    assert advice.number("microbatches").value == 16 and "of 4 sequences as in the config" in advice.numbers[-1].source
    free = advise(config, 10**9, batch_shards=4)
    assert free.overrides["train.batch_size"] % (4 * free.overrides["train.microbatches"]) == 0
    small = advise(config, 100_000, batch_shards=2).overrides
    assert (small["train.batch_size"], small["train.microbatches"]) == (2, 1)


def test_the_planner_splits_for_a_machine():
    machine = parse("v5e:2x4")
    config = experiment()
    advice = advise(config, 100_000_000, topology=machine)
    batch = advice.number("global batch").value
    assert batch * 256 == pytest.approx(STEP_LAW.batch_tokens.at(10**8).value, rel=0.42)
    assert advice.number("memory per device").value <= MARGIN * machine.kind.usable_bytes / 2**30
    assert "arrangements that fit v5e:2x4" in advice.number("microbatches").source
    chosen = changed(config, advice.overrides)
    degrees = chosen.mesh.degrees
    assert math.prod(degrees.values()) == 8
    order = ("stage", "data", "fsdp", "expert", "sequence", "tensor")
    check_fit(chosen, abstract_rules(tuple(degrees[axis] for axis in order), chosen.mesh.layout))


@pytest.mark.parametrize(
    ("tokens", "settled", "message"),
    [
        (1000, {}, "--tokens=1,000 is too few: .* give at least 12,800"),
        (1_000_000, {"global_batch": 512}, "--tokens=1,000,000 is too few .* 7 steps; give at least 6,553,600"),
        (
            10**9,
            {"global_batch": 63, "topology": "2*v5e:2x4"},
            "no mesh of 16 devices divides the model and the batch of 63",
        ),
        (10**9, {"global_batch": 30, "batch_shards": 8}, "--global_batch=30 is not a multiple of the 8 batch shards"),
    ],
)
def test_what_cannot_be_advised_is_refused(tokens, settled, message):
    if "topology" in settled:
        settled = settled | {"topology": parse(settled["topology"])}
    with pytest.raises(UserError, match=message):
        advise(experiment(), tokens, **settled)


def test_stages_are_advised_one_by_one():
    staged = dataclasses.replace(experiment(), schedule=ScheduleConfig(stages=(StageConfig(10),)))
    with pytest.raises(UserError, match=r"config\.schedule\.stages"):
        advise(staged, 10**9)
