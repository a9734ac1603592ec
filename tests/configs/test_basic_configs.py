"""The two-tower experiments: complete, and of the size that their docstrings give."""

import pathlib

import pytest

from ml.config import build
from ml.models import num_parameters
from ml.train.config import ExperimentConfig
from scripts import config_flag

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "basic"


@pytest.mark.parametrize(("name", "parameters"), [("tiny_cpu", 1.5e5), ("basic_65k", 2.5e9)])
def test_is_a_whole_experiment_and_says_how_to_run_it(name, parameters):
    config = build(ExperimentConfig, config_flag.load_file(str(CONFIGS / f"{name}.py")).to_dict())
    assert num_parameters(config.model) == pytest.approx(parameters, rel=0.1)
    assert name == "tiny_cpu" or config.train.batch_size == 65_536
    text = (CONFIGS / f"{name}.py").read_text()
    for line in ("Command:", "Hardware:", "Time:", "Expect:", f"configs/basic/{name}.py"):
        assert line in text, f"{name}: the docstring lacks {line}"
