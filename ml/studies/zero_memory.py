"""ZeRO: a device's share of the model states falls in proportion to the number of devices (stage 3).

No training is needed: states are bytes, and which device keeps which of them follows from the layout. They are counted
for the paper's example (Rajbhandari et al. 2020, section 3 and figure 1): 7.5 billion parameters, Adam, 64 devices.
"""

from collections.abc import Sequence

from ml.config import build
from ml.models import TransformerConfig
from ml.models.cost import parameter_count
from ml.parallel import AXES
from ml.plan.memory import MemoryModel, abstract_rules
from ml.studies.outcome import Budget, Measured, Outcome, Panel, Series
from ml.train.base import base
from ml.train.config import ExperimentConfig

STAGES = {"ddp": "no stage", "zero1": "stage 1", "zero2": "stage 2", "zero3": "stage 3"}
MODEL = TransformerConfig(
    vocab_size=51_200,
    num_layers=36,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    mlp_dim=4 * 4096,
    max_length=1024,
    gated_mlp=False,
    tie_embeddings=True,
)
DEVICES = 64
_COUNTS = (1, 4, 16, 64, 256, 1024)
# The paper's figure 1, in GB; the factor of stage 3 is the number of devices.
_PUBLISHED = {"no stage": 120.0, "stage 1": 31.4, "stage 2": 16.6, "stage 3": 1.9}
_TOLERANCE = 0.01


def run(budget: Budget) -> Outcome:
    """See the module's docstring; both budgets are the same."""
    del budget
    return study(MODEL, _COUNTS, DEVICES)


def study(model: TransformerConfig, counts: Sequence[int], devices: int) -> Outcome:
    """Counts the bytes of ``model`` on each of ``counts`` devices; judges by ``devices``, one of them."""
    memory = MemoryModel(_experiment(model))
    gigabytes = {name: tuple(state_bytes(memory, layout, n) / 1e9 for n in counts) for layout, name in STAGES.items()}
    at = {name: values[counts.index(devices)] for name, values in gigabytes.items()}
    factor = at["no stage"] / at["stage 3"]
    holds = 1 / (1 + _TOLERANCE) <= factor / devices <= 1 + _TOLERANCE
    parameters = parameter_count(model).total
    return Outcome(
        paper="ZeRO (Rajbhandari et al. 2020)",
        have="stages 1 to 3, and whole replicas of cut groups (ml/parallel/rules.py)",
        claim=f"In stage 3 each of {devices} devices keeps 1/{devices} of the model states",
        setup=(
            f"A decoder of {parameters / 1e9:.1f} billion parameters with AdamW. States: parameters, two moments and "
            "gradients, all float32: 16 bytes for each parameter, as in the paper, whose split is another (16-bit "
            "parameters and gradients, a 32-bit copy). For stages 1 and 2 the 16-bit copy that layers read counts too. "
            f"Counted from the placement of every array, not measured. Holds within {_TOLERANCE:.0%}."
        ),
        baseline=Measured("published", (float(devices),)),
        ours=Measured("counted", (factor,)),
        unit="times less than without ZeRO",
        relation="~",
        tolerance=_TOLERANCE,
        holds=holds,
        reason="" if holds else f"it is {factor:.3g} times less",
        panels=(
            Panel(
                "devices",
                "model states on each (GB)",
                tuple(Series(name, tuple(map(float, counts)), values) for name, values in gigabytes.items()),
                x_log=True,
                y_log=True,
            ),
        ),
        details={"parameters": parameters, "gigabytes": gigabytes, "published_gigabytes": _PUBLISHED},
        url="https://arxiv.org/abs/1910.02054",
    )


def state_bytes(memory: MemoryModel, layout: str, devices: int) -> int:
    """What a device keeps of parameters, moments, gradients, and of the copy that layers read where it is another."""
    rules = abstract_rules(tuple(devices if axis == "data" else 1 for axis in AXES), layout)
    copy = memory.weight_bytes(rules, "compute", 2) if layout in ("zero1", "zero2") and devices > 1 else 0
    return sum(memory.state_bytes(rules)) + memory.weight_bytes(rules, "gradients", 4) + copy


def _experiment(model: TransformerConfig) -> ExperimentConfig:
    config = base(model)
    config.optimizer.name = "adamw"
    return build(ExperimentConfig, config.to_dict())
