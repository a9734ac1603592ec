"""ResNet's experiments: complete, of the published size, and with the batches, rates and warm-ups of LAMB's paper."""

import pathlib

import pytest

from ml.config import build
from ml.models import ResNetConfig, num_parameters
from ml.optim import make_schedule
from ml.train.config import ExperimentConfig
from scripts import config_flag

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "resnet"
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py"))
# You et al. 2020, the table of ResNet-50's hyperparameters: batch -> k of the rate 0.04 / 2^(k/2), warm-up 20 / 2^k.
TABLE = {"512": 6, "1k": 5, "2k": 4, "4k": 3, "8k": 2, "16k": 1, "32k": 0}


def load(name: str, argument: str = "") -> ExperimentConfig:
    spec = str(CONFIGS / f"{name}.py") + (f":{argument}" if argument else "")
    return build(ExperimentConfig, config_flag.load_file(spec).to_dict())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_is_a_whole_experiment_and_says_how_to_run_it(name):
    assert isinstance(load(name).model, ResNetConfig)
    text = (CONFIGS / f"{name}.py").read_text()
    for line in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert line in text, f"{name}: the docstring lacks {line}"
    assert f"configs/resnet/{name}.py" in text


@pytest.mark.parametrize("name", sorted(TABLE))
def test_follows_the_papers_table(name):
    k = TABLE[name]
    config = load(f"imagenet_{name}", "/data/x")
    batch, steps = 32_768 // 2**k, config.train.steps
    assert (config.train.batch_size, config.optimizer.name, config.data.path) == (batch, "lamb", "/data/x/train")
    assert num_parameters(config.model) == 25_557_032
    rate = make_schedule(config.schedule, config.optimizer.learning_rate, total_steps=steps, batch_size=batch)
    epoch = 1_281_167 / batch
    assert steps == pytest.approx(90 * epoch, abs=1)
    warmup = round(20 / 2**k * epoch)
    assert rate(0) == 0 and rate(warmup) == pytest.approx(0.04 / 2 ** (k / 2), rel=1e-6)
    assert rate(warmup - 1) < rate(warmup) > rate(warmup + 1) and rate(steps) == pytest.approx(0, abs=1e-9)
    text = (CONFIGS / f"imagenet_{name}.py").read_text()
    assert (
        f"{steps:,} steps" in text
        and f"{20 / 2**k:g} epochs" in text
        and f"rate {0.04 / 2 ** (k / 2):.6f}".rstrip("0") in text
    )
