"""BERT's experiments: complete, of the published sizes, and with the batches, rates and steps of LAMB's paper."""

import json
import pathlib

import pytest

from ml.config import build, to_dict
from ml.errors import UserError
from ml.models.cost import parameter_count
from ml.optim import make_schedule
from ml.train.config import ExperimentConfig
from scripts import config_flag

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "bert"
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "classify")
# You et al. 2020, table 1 and section 4: batch -> (steps, rate, share of the steps that is warm-up).
TABLE = {
    "512": (512, 1_000_000, 5e-3 / 2**3, 1 / 320),
    "1k": (1024, 500_000, 5e-3 / 2**2.5, 1 / 160),
    "2k": (2048, 250_000, 5e-3 / 2**2, 1 / 80),
    "4k": (4096, 125_000, 5e-3 / 2**1.5, 1 / 40),
    "8k": (8192, 62_500, 5e-3 / 2**1, 1 / 20),
    "16k": (16_384, 31_250, 5e-3 / 2**0.5, 1 / 10),
    "32k": (32_768, 15_625, 5e-3, 1 / 5),
}


def load(name: str, argument: str = "") -> ExperimentConfig:
    spec = str(CONFIGS / f"{name}.py") + (f":{argument}" if argument else "")
    return build(ExperimentConfig, config_flag.load_file(spec).to_dict())


def rates(config: ExperimentConfig):
    steps, batch = config.train.steps, config.train.batch_size
    return make_schedule(config.schedule, config.optimizer.learning_rate, total_steps=steps, batch_size=batch)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_is_a_whole_experiment_and_says_how_to_run_it(name):
    config = load(name)
    assert config.data.masked is not None and config.model.encoder is not None
    text = (CONFIGS / f"{name}.py").read_text()
    for line in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert line in text, f"{name}: the docstring lacks {line}"
    assert f"configs/bert/{name}.py" in text


@pytest.mark.parametrize("name", sorted(TABLE))
def test_both_stages_follow_the_papers_table(name):
    batch, steps, rate, warmup = TABLE[name]
    first, second = load(f"large_{name}"), load(f"large_{name}", "runs/first")
    assert first.train.batch_size == second.train.batch_size == batch
    assert first.train.steps + second.train.steps == steps
    assert first.train.steps == pytest.approx(0.9 * steps, abs=1)
    assert (first.data.sequence_length, second.data.sequence_length) == (128, 512)
    assert first.optimizer.name == "lamb" and second.train.init_from == second.data.tokenizer.path == "runs/first"
    early, late = rates(first), rates(second)
    peak = round(warmup * steps)
    assert early(0) == 0 and early(peak) == pytest.approx(rate, rel=1e-6)
    # One line from the peak to zero, through both.
    for step in (peak, first.train.steps - 1):
        assert early(step) == pytest.approx(rate * (steps - step) / (steps - peak), rel=1e-5)
    assert late(0) == pytest.approx(rate * second.train.steps / (steps - peak), rel=1e-5)
    assert late(second.train.steps) == pytest.approx(0, abs=1e-9)


def test_the_mixed_batch_warms_up_anew():
    first, second = load("large_64k_32k_mixed"), load("large_64k_32k_mixed", "runs/first")
    assert (first.train.batch_size, second.train.batch_size) == (65_536, 32_768)
    assert (first.data.sequence_length, second.data.sequence_length) == (128, 512)
    for config in (first, second):
        rate = rates(config)
        assert rate(0) == 0 and rate(config.schedule.warmup_steps) == pytest.approx(config.optimizer.learning_rate)
    assert first.train.steps + second.train.steps == pytest.approx(8599, abs=5)
    # As many sequences at 128 as nine tenths of 512 million, and the rest at 512.
    assert first.train.steps * 65_536 == pytest.approx(0.9 * 512e6, rel=0.01)
    assert second.train.steps * 32_768 == pytest.approx(0.1 * 512e6, rel=0.01)


def test_sizes_are_those_of_the_published_checkpoints():
    assert parameter_count(load("base").model).total == 110_106_428
    assert parameter_count(load("large_512").model).total == 336_226_108


def test_the_classifier_needs_a_pretrained_encoder(tmp_path):
    with pytest.raises(UserError, match="name the model's folder"):
        load("classify")
    folder = tmp_path / "donor"
    folder.mkdir()
    model = load("tiny_cpu").model
    (folder / "experiment.json").write_text(json.dumps({"model": to_dict(model)}))
    config = load("classify", str(folder))
    assert config.model.encoder.num_classes == len(config.data.labelled.labels) > 2
    assert config.train.init_from == config.data.tokenizer.path == str(folder)
