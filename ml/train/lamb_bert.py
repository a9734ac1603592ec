"""LAMB's BERT experiments as data: batch, rate, warm-up and steps of each stage (You et al. 2020, section 4)."""

import dataclasses
import math

from ml_collections import ConfigDict

from ml.data import DataConfig, MaskedConfig, SourceConfig, TokenizerConfig
from ml.models import TransformerConfig
from ml.train.base import base

# Steps of linear warm-up, the same for every batch: its share of training grows linearly with the batch.
WARMUP_STEPS = 3125
# The batch that the table ends with, and its learning rate; it falls with the square root of the batch.
LARGEST_BATCH, LARGEST_RATE = 32_768, 5e-3
# Sequences of the whole training: a million steps of 512 (the first stage has nine tenths of them).
SEQUENCES = 1_000_000 * 512


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of pre-training.

    Attributes:
      batch_size: sequences.
      length: tokens in each.
      steps: optimizer steps.
      learning_rate: at the peak.
      warmup_steps: of linear warm-up from zero.
      end_factor: rate after the last step, as a share of the peak.
    """

    batch_size: int
    length: int
    steps: int
    learning_rate: float
    warmup_steps: int
    end_factor: float = 0.0


def single_batch_stages(batch_size: int) -> tuple[Stage, Stage]:
    """The recipe of table 1 for one batch size: nine tenths of the steps at length 128, then one at 512.

    One warm-up and one linear decay span both. The second stage starts from the parameters of the first, with moments
    of its own, where the first one's rate had come.
    """
    steps = SEQUENCES // batch_size
    first = steps * 9 // 10
    rate = LARGEST_RATE * math.sqrt(batch_size / LARGEST_BATCH)
    left = (steps - first) / (steps - WARMUP_STEPS)
    return (
        Stage(batch_size, 128, first, rate, WARMUP_STEPS, end_factor=left),
        Stage(batch_size, 512, steps - first, rate * left, 0),
    )


def mixed_batch_stages() -> tuple[Stage, Stage]:
    """65,536 sequences of 128, then 32,768 of 512, with the rate warmed up anew: the recipe of 76 minutes.

    The paper gives the batches and the re-warm-up; rates, warm-ups and steps are those of NVIDIA's public reproduction
    (7,038 + 1,564 steps where the paper has 8,599).
    """
    return Stage(65_536, 128, 7038, 6e-3, 2000), Stage(32_768, 512, 1564, 4e-3, 200)


def stage_experiment(model: TransformerConfig, stages: tuple[Stage, Stage], first_workdir: str = "") -> ConfigDict:
    """The first stage, or the second one if the first has been trained.

    Args:
      model: a BERT.
      stages: both.
      first_workdir: work directory of the first stage; empty: this is it.
    """
    stage = stages[1] if first_workdir else stages[0]
    data = DataConfig(
        sources=(SourceConfig(kind="python_prose"),),
        tokenizer=TokenizerConfig(vocab_size=model.vocab_size, path=first_workdir),
        sequence_length=stage.length,
        masked=MaskedConfig(max_predictions=20 if stage.length <= 128 else 80),
    )
    config = base(model, data)
    config.train.init_from = first_workdir

    config.optimizer.name = "lamb"
    config.optimizer.learning_rate = stage.learning_rate
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.kind = "linear"
    config.schedule.warmup_steps = stage.warmup_steps
    config.schedule.end_factor = stage.end_factor

    config.train.dropout = 0.1
    config.train.steps = stage.steps
    config.train.batch_size = stage.batch_size
    # 64 rows of 128 or 16 of 512 at a time on each of eight devices.
    config.train.microbatches = max(1, stage.batch_size * stage.length // (8 * 64 * 128))
    config.train.remat = "dots_no_batch"
    config.eval.every = max(1, stage.steps // 20)
    config.checkpoint.every = max(1, stage.steps // 20)
    return config
