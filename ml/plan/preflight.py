"""Proves a job without its machine: compiles the step for the topology, and reads memory, traffic and bounds off it."""

import time
from importlib import metadata
from typing import Any

import jax

from ml.models import TransformerConfig
from ml.parallel import AXES
from ml.plan.collectives import Collective, collectives
from ml.plan.flops import computed_flops
from ml.plan.links import bandwidth
from ml.plan.memory import MemoryModel
from ml.plan.mends import mends
from ml.plan.program import Program, assemble
from ml.plan.refusal import read_refusal
from ml.plan.report import DeviceMemory, Report
from ml.plan.roofline import memory_traffic, roofline
from ml.plan.topology import Topology
from ml.train.config import ExperimentConfig
from ml.train.memory import bytes_per_device
from ml.train.offload import HOST

# Rows and columns of a kernel's tile, by which causality skips work (`pallas_kernels.flash_attention.splash`).
_TILE = 1024


def preflight(config: ExperimentConfig, topology: Topology) -> Report:
    """Compiles the train step of ``config`` for ``topology`` and reports what it would take. Runs nothing.

    Raises:
      UserError: the experiment does not fit the number of devices, or its compiler is not installed.
    """
    program = assemble(config, topology.devices())
    start, compiled, refusal = time.monotonic(), None, None
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        refusal = read_refusal(str(error))
        if refusal is None:
            raise
    seconds = time.monotonic() - start

    state, batch = program.state, bytes_per_device(program.batch)
    model = MemoryModel(config)
    held = model.predict(config, program.rules, program.model.dtype.itemsize)
    hosted = [x for x in jax.tree.leaves(state.opt_state) if x.sharding.memory_kind == HOST]
    host = bytes_per_device(hosted)
    arguments = bytes_per_device(state) - host + batch
    available = topology.kind.usable_bytes
    if compiled is not None:
        plan = compiled.memory_analysis()
        temporary, code = plan.temp_size_in_bytes, plan.generated_code_size_in_bytes
        outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
        needed = float(arguments + max(outputs, 0) + temporary + code)
    else:
        assert refusal is not None
        temporary, code = None, 0
        needed = max(available, refusal.needed_bytes or held.total) + (arguments if refusal.temporaries_only else 0)
        available = refusal.available_bytes or available
    memory = DeviceMemory(
        params=bytes_per_device(state.params),
        opt_state=bytes_per_device(state.opt_state) - host,
        ema=bytes_per_device(state.ema),
        batch=batch,
        temporary=temporary,
        program=code,
        host=host,
        compute_copies=held.compute_copies,
        gradients=held.gradients,
        gathered=held.gathered,
        activations=held.activations,
        needed=needed,
        available=available,
    )
    mesh = program.rules.mesh
    sent = collectives(compiled.as_text(), mesh.shape, config.mesh.slice_axis) if compiled is not None else []
    tokens = config.tokens_per_step
    computed = computed_flops(program.traced.jaxpr, _kernel_share(config))
    line = None
    if compiled is not None:
        line = roofline(
            config,
            topology,
            computed_flops=computed,
            memory_bytes=memory_traffic(config, program.rules, model),
            network=_network_seconds(topology, program, sent),
        )
    return Report(
        topology=topology.name,
        device_kind=topology.kind.device_kind,
        devices=topology.device_count,
        mesh=dict(mesh.shape),
        layout=config.mesh.layout,
        tokens=tokens,
        memory=memory,
        collectives=sent,
        flops={
            "model": config.flops_per_token * tokens / topology.device_count,
            "computed": computed / topology.device_count,
        },
        roofline=line,
        mends=[] if memory.fits else mends(config, topology.device_count, needed=needed, available=available),
        compile_seconds=seconds,
        versions=_versions(),
    )


def _network_seconds(topology: Topology, program: Program, sent: list[Collective]) -> dict[str, float]:
    """Seconds of a step's transfers, by the axes along which they go; a permutation to a neighbour uses one link."""
    seconds: dict[str, float] = {}
    for one in sent:
        rate = bandwidth(topology, program.rules.mesh.devices, one.axes)
        if one.kind == "collective-permute" and topology.platform == "tpu" and topology.slices == 1:
            assert topology.chip.link_bandwidth is not None
            rate = topology.chip.link_bandwidth
        key = "+".join(name for name in AXES if name in one.axes)
        seconds[key] = seconds.get(key, 0.0) + one.total / rate
    return seconds


def _kernel_share(config: ExperimentConfig) -> float:
    """Of a causal kernel's tiles, those that are not skipped."""
    if not isinstance(config.model, TransformerConfig):
        return 1.0
    tiles = max(1, config.data.sequence_length // _TILE)
    window = config.model.sliding_window
    reach = tiles if window is None or config.model.window_pattern else min(tiles, -(-window // _TILE) + 1)
    return sum(min(row + 1, reach) for row in range(tiles)) / tiles**2


def _versions() -> dict[str, str]:
    wanted = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
    installed: dict[str, Any] = {
        d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()
    }
    return {name: installed[name] for name in wanted if name in installed}
