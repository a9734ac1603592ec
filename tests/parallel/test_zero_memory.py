"""ZeRO's table: the bytes of each layout on a device, as arrays lie on eight of them and as a TPU's compiler plans.

Per parameter, of AdamW in float32 (parameter and two moments) with bfloat16 activations, on N devices that share all
work. Rajbhandari et al. 2020, figure 1, has the same but for ZeRO-2, whose gradients are 16-bit there (2 + 14 / N):

| layout | kept between steps | copies to multiply by | gradients | in all |
|---|---|---|---|---|
| ddp | 12 | | 4 | 16 |
| zero1 | 12 / N | 2 | 2 | 4 + 12 / N |
| zero2 | 12 / N | 2 | 4 / N | 2 + 16 / N |
| zero3 | 12 / N | | 4 / N | 16 / N |

The compiler may plan less, since copies and gradients need not live all at one time, and it casts all weights of ddp
before the first layer (3).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import initial_params

from ml.data import DataConfig
from ml.models import Transformer, TransformerConfig, logical_axes
from ml.models.cost import parameter_count
from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
from ml.parallel import MeshConfig, Rules
from ml.plan import topology
from ml.plan.hlo import Module
from ml.plan.program import assemble
from ml.train.config import ExperimentConfig, TrainConfig
from ml.train.gradients import _differentiated
from ml.train.memory import bytes_per_device
from ml.train.state import init_state

N = 8
IN_ALL = {"ddp": 16, "zero1": 4 + 12 / N, "zero2": 2 + 16 / N, "zero3": 16 / N}
ADAMW = OptimizerConfig("adamw", 1e-3)
# Few tokens, wide layers: activations are a hundredth of the weights.
MODEL = TransformerConfig(
    vocab_size=1024, num_layers=4, embed_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, mlp_dim=4096,
    max_length=16, tie_embeddings=True,
)  # fmt: skip


def per_parameter(tree):
    """Bytes of the shards of one device."""

    def held(x):
        spec = jax.typeof(x).sharding.spec
        return x.dtype.itemsize * np.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape))

    mesh = jax.sharding.get_abstract_mesh()
    return sum(map(held, jax.tree.leaves(tree))) / parameter_count(MODEL).total


@pytest.mark.sweep("ddp", "zero2")
@pytest.mark.parametrize("layout", IN_ALL)
def test_what_lies_on_eight_devices(layout):
    rules, axes = Rules.make(MeshConfig(layout=layout)), logical_axes(MODEL)
    tx, _ = make_optimizer(ADAMW, ScheduleConfig(), total_steps=1, batch_size=N, axes=axes)
    model = Transformer(MODEL, dtype=jnp.bfloat16, place=rules.spec)
    with jax.set_mesh(rules.mesh):
        start = initial_params(MODEL)
        params = jax.device_put(start, rules.shardings(axes, start))
        state = init_state(model, tx, rules, seed=0, ema=False, params=params)
        kept = bytes_per_device((state.params, state.opt_state)) / parameter_count(MODEL).total
        variables, constants = jax.eval_shape(lambda params: _differentiated(params, model, rules), params)
        copies = constants if layout == "zero2" else variables if layout == "zero1" else ()
        in_all = kept + per_parameter(copies) + per_parameter(variables)  # a gradient lies as its variable does
    assert in_all == pytest.approx(IN_ALL[layout], rel=0.05)


def gathered(compiled, dtype):
    """Elements of all-gathers as a share of the parameters, the copies' type or the optimizer state's; norms aside."""
    width, total = {"bf16": 2, "f32": 4}[dtype], 0
    for one in Module(compiled.as_text()).occurrences():
        for kind, size in one.instruction.arrays if one.instruction.opcode.startswith("all-gather") else ():
            if kind == dtype and size // width > MODEL.embed_dim**2 // N:
                total += one.times * size // width
    return total / parameter_count(MODEL).total


@pytest.mark.slow  # four compilations for a TPU, which cannot be cached
def test_what_a_step_takes_on_eight_tpus(absent_tpus):
    planned, devices = {}, topology.parse("v5e:2x4").devices()
    for layout in IN_ALL:
        config = ExperimentConfig(
            model=MODEL,
            data=DataConfig(sequence_length=MODEL.max_length),
            optimizer=ADAMW,
            train=TrainConfig(batch_size=N, remat="full", attention="xla", dtype="bfloat16"),
            mesh=MeshConfig(layout=layout),
        )
        compiled = assemble(config, devices).compile()
        assert not gathered(compiled, "f32"), f"{layout}: moments and master weights stay where they are"
        assert layout == "ddp" or gathered(compiled, "bf16") > 0.9, layout
        plan = compiled.memory_analysis()
        kept, parameters = plan.argument_size_in_bytes, parameter_count(MODEL).total
        assert kept / parameters == pytest.approx(12 / (1 if layout == "ddp" else N), rel=0.05)
        planned[layout] = (kept + plan.temp_size_in_bytes) / parameters
        assert planned[layout] < (IN_ALL[layout] + (3 if layout == "ddp" else 0)) * 1.05, layout
    assert planned["ddp"] > 3 * planned["zero1"] > 3.5 * planned["zero2"] > 4 * planned["zero3"], planned
