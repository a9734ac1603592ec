"""An experiment as data: everything that `configs/*.py` and the command line can set."""

import dataclasses
from typing import Annotated, Any, Literal

from ml.checkpoint import CheckpointConfig
from ml.data import DataConfig, ImageDataConfig, ImageTextDataConfig
from ml.models import ModelConfig
from ml.optim import OptimizerConfig, ScheduleConfig
from ml.parallel import HealthConfig, MeshConfig
from ml.train.kinds import check_experiment, kind_of
from pallas_kernels.flash_attention import Implementation


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: optimizer steps in the whole run.
      batch_size: global batch, in sequences, images or pairs.
      microbatches: parts of the batch that are computed one after another and summed; divides ``batch_size``.
      dtype: of activations; ``auto``: bfloat16 on accelerators, float32 on CPU. Parameters are always float32.
      remat: what the backward pass keeps of a layer (`ml.models.REMAT_POLICIES`): ``none`` keeps everything,
        ``dots_no_batch`` the products with weights (attention and elementwise work is done again), ``full`` only the
        layer's input, ``offload`` only that, in the hosts' memory.
      offload_optimizer: keep the optimizer state in the hosts' memory between steps.
      attention: implementation of training attention (`pallas_kernels.flash_attention`).
      context: how tokens attend over a sequence that ``config.mesh.sequence`` cuts: keys and values go round
        (``ring``), or heads are exchanged for tokens (``ulysses``).
      loss_chunk: tokens of a row whose logits exist at one time (of a contrastive loss: rows of similarities, on each
        device); 0: all.
      dropout: of an encoder's hidden states (0.1 in BERT's recipe).
      adversarial: whether images are attacked in training (`ml.train.conadv`): ``sequential``, by the weights that then
        train on them (DisAdv); ``concurrent``, by those of the step before (ConAdv); ``noise``: moved at random, the
        control of both.
      adversarial_step: how far the attack moves each pixel, in [0, 1].
      label_smoothing: share of an image's label that is spread evenly over all classes (0.1 for ImageNet).
      z_loss: weight of ``log(Z)^2``, which keeps the softmax normalizer near one (PaLM, section 5).
      ema: decay of an exponential moving average of the parameters, used for evaluation; 0: none is kept.
      ema_statistics: evaluate that average with an average of the running batch-norm statistics (those that its
        parameters have seen); false: with the newest.
      noise_scale: measure the gradient's noise scale, which is about the largest batch worth training with
        (`ml.train.noise_scale`); changes nothing else. Needs microbatches, or replicas that sum gradients once a step.
      nonfinite: what a NaN or infinity in loss or gradients does: ``skip`` drops and counts the step, ``stop`` ends the
        run, with the batch saved in the work directory.
      pipeline: when the stages of a pipeline (``mesh.stage`` > 1, whose microbatches are ``microbatches``) turn from
        forward to backward passes: ``1f1b``, as soon as they can, so that memory does not grow with the number of
        microbatches; ``gpipe``, when all forward passes are done.
      pipeline_chunks: runs of layers on each stage; more of them shorten the pipeline's idle time and lengthen its
        communication. With more than one, ``mesh.stage`` divides ``microbatches``.
      log_every: steps between rows of ``metrics.jsonl``.
      init_from: work directory or Hugging Face folder whose parameters to start from; empty: random.
    """

    steps: int = 1000
    batch_size: int = 256
    microbatches: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "dots", "dots_no_batch", "full", "offload"] = "dots_no_batch"
    offload_optimizer: bool = False
    attention: Implementation = "auto"
    context: Literal["ring", "ulysses"] = "ring"
    loss_chunk: int = 0
    dropout: float = 0.0
    adversarial: Literal["none", "noise", "sequential", "concurrent"] = "none"
    adversarial_step: float = 0.1
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ema: float = 0.0
    ema_statistics: bool = True
    noise_scale: bool = False
    nonfinite: Literal["skip", "stop"] = "stop"
    pipeline: Literal["gpipe", "1f1b"] = "1f1b"
    pipeline_chunks: int = 1
    log_every: int = 1
    init_from: str = ""

    def __post_init__(self):
        for name in ("steps", "batch_size", "microbatches", "pipeline_chunks", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.microbatches:
            raise ValueError(f"microbatches={self.microbatches} does not divide batch_size={self.batch_size}")
        if not 0 < self.adversarial_step <= 1:
            raise ValueError(f"adversarial_step={self.adversarial_step} must lie in (0, 1]")
        for name in ("ema", "dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out text while training.

    Attributes:
      every: steps between evaluations; 0: only at the end.
      batches: global batches in each; the one at the end of the run takes the whole held-out text.
      batch_size: sequences in one; 0: as many as in a training microbatch.
    """

    every: int = 0
    batches: int = 8
    batch_size: int = 0


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment.

    Attributes:
      model: an architecture; which data it learns from, and what else must fit, is said in `ml.train.kinds`.
      seed: of initial parameters and data order.
    """

    model: Annotated[Any, ModelConfig]
    data: Annotated[Any, DataConfig | ImageDataConfig | ImageTextDataConfig]
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    health: HealthConfig = HealthConfig()
    seed: int = 0

    @property
    def flops_per_token(self) -> float:
        """FLOPs of the model, forward and backward, for each token of a full row, or for each image."""
        return kind_of(self.model).flops(self)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch of full rows, or its images."""
        return self.train.batch_size * kind_of(self.model).units(self)

    def __post_init__(self):
        check_experiment(self)
