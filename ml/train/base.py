"""What every experiment starts from: each key there is, at its default. A config file is a difference to it."""

from ml_collections import ConfigDict

from ml.config import to_dict
from ml.data import DataConfig, ImageDataConfig, ImageTextDataConfig
from ml.models import ModelConfig
from ml.optim import OptimizerConfig
from ml.train.config import ExperimentConfig


def base(model: ModelConfig, data: DataConfig | ImageDataConfig | ImageTextDataConfig | None = None) -> ConfigDict:
    """A complete experiment for ``model``: LAMB, linear warm-up and decay, the standard library's source as text.

    Args:
      model: the architecture.
      data: ``None``: as much of the default source in a row as a transformer takes.
    """
    optimizer = OptimizerConfig(name="lamb", learning_rate=0.01, weight_decay=0.01, clip_norm=1.0)
    data = DataConfig(sequence_length=model.max_length) if data is None else data  # type: ignore[union-attr]
    return ConfigDict(to_dict(ExperimentConfig(model=model, data=data, optimizer=optimizer)))
