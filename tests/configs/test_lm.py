"""Every committed experiment: complete, accepted, and of the size that its docstring claims."""

import pathlib

import pytest

from ml.config import build
from ml.models.cost import parameter_count
from ml.train.config import ExperimentConfig
from scripts import config_flag

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs" / "lm"

# As counted in the checkpoints that their authors published.
PUBLISHED = {
    "gpt2_124m": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_8b": 8_190_735_360,
    "mixtral_8x7b": 46_702_792_704,
}
EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "finetune")


def load(name: str) -> ExperimentConfig:
    return build(ExperimentConfig, config_flag.load_file(str(CONFIGS / f"{name}.py")).to_dict())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_is_a_whole_experiment_and_says_how_to_run_it(name):
    config = load(name)
    assert config.train.steps > 0
    text = (CONFIGS / f"{name}.py").read_text()
    for line in ("Command:", "Hardware:", "Time:", "Expect:"):
        assert line in text, f"{name}: the docstring lacks {line}"
    assert f"configs/lm/{name}.py" in text


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_has_the_published_number_of_parameters(name):
    assert parameter_count(load(name).model).total == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,}" in (CONFIGS / f"{name}.py").read_text()


def test_the_list_of_published_sizes_is_complete():
    assert set(EXPERIMENTS) - set(PUBLISHED) == {"quickstart"}
