"""Measures the train step against the peak of its devices, or plans its memory for devices that are not there.

A Llama of about one billion parameters at sequence length 4096 trains on random tokens with the step that
`scripts/train.py` runs: bfloat16 activations, float32 parameters. Each setting has a process of its own, so that one
that does not fit costs nothing but itself and peak memory is its own. In it, first a large product of random matrices
is timed (many in one program), then the training: batches lie on the device, and the steps of a round are queued
without waiting for one another.

On one H200 (not timed yet; the file is written anew after each setting, so a run that is cut off keeps its results):

  PYTHONPATH=. python scripts/bench_mfu.py --steps=5 --output=docs/results/bench_mfu_h200.json

Besides JAX with its CUDA plugin, Flax, Optax and Orbax this imports Grain. On a machine without a package index:

  pip download --no-deps -d wheels grain==0.2.18 array_record==0.8.6 portpicker==1.6.0    # elsewhere, for its Python
  pip install --no-index --no-deps wheels/*.whl
"""

import dataclasses
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import app
import result_file
from absl import flags

_USAGE = """
Trains a 1B Llama at sequence 4096 on random tokens: tokens/s, MFU, memory. Or plans memory for absent devices.

  python scripts/bench_mfu.py --steps=10                                         # the default settings, for an H200
  python scripts/bench_mfu.py --settings='[{"batch_size": 8}, {"batch_size": 16, "remat": "full"}]'
  python scripts/bench_mfu.py --compile_for=h200      # no device needed, only pip install "jax[cuda13]"
"""

# name -> architecture; `max_length` is the length trained at.
SIZES: dict[str, dict[str, Any]] = {
    # Llama 3.2 1B with heads of 128 instead of 64: every matrix and so every FLOP is the same, but a score costs twice
    # the multiplications, so that the exponentials, of which there are half as many, no longer bound fused attention.
    "1b": {
        "vocab_size": 128256,
        "num_layers": 16,
        "embed_dim": 2048,
        "num_heads": 16,
        "num_kv_heads": 4,
        "head_dim": 128,
        "mlp_dim": 8192,
        "max_length": 4096,
        "tie_embeddings": True,
    },
    "tiny": {
        "vocab_size": 128,
        "num_layers": 2,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 64,
        "max_length": 32,
        "tie_embeddings": True,
    },
}
SIZES["1b_heads64"] = SIZES["1b"] | {"num_heads": 32, "num_kv_heads": 8, "head_dim": 64}

_WARMUP_STEPS, _ROUNDS = 2, 3
_ROOT = Path(__file__).resolve().parents[1]
_GIB = 2**30
# Of the device's memory, what JAX may take; the rest is for the driver, cuDNN and NCCL.
_MEMORY_FRACTION = 0.93


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is tried: fields of `ml.train.config.TrainConfig`, and:

    Attributes:
      optimizer: key of `ml.optim.OPTIMIZERS`.
      documents: packed in each row. With 1 no segment ids are given; more need a mask, which cuDNN reads from memory.
    """

    batch_size: int = 8
    microbatches: int = 1
    remat: Literal["none", "dots", "dots_no_batch", "full"] = "dots_no_batch"
    attention: Literal["auto", "cudnn", "splash", "xla"] = "auto"
    loss_chunk: int = 0
    optimizer: str = "lamb"
    documents: int = 1


_H200 = {"batch_size": 8, "attention": "cudnn", "loss_chunk": 1024}
_TPU = {"batch_size": 8, "loss_chunk": 512}
DEFAULT_SETTINGS: dict[str, list[dict[str, Any]]] = {
    "h200": [  # the most telling first
        _H200,
        _H200 | {"remat": "none"},
        _H200 | {"batch_size": 32, "microbatches": 4, "remat": "none"},
        _H200 | {"batch_size": 16},
        _H200 | {"optimizer": "adamw"},
        _H200 | {"documents": 4},
        _H200 | {"attention": "xla"},
    ],
    "v5e": [_TPU, _TPU | {"remat": "full"}],
    "v6e": [_TPU, _TPU | {"batch_size": 32}],
    "tiny": [{}],
}


# Names of `ml.plan.topology` to compile for.
TARGETS = {"h200": "h200:1", "v5e": "v5e:2x4", "v6e": "v6e:2x4"}


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_enum("size", "1b", list(SIZES), "the model")
    flags.DEFINE_integer("steps", 10, "timed steps in each of three rounds", lower_bound=1)
    flags.DEFINE_string("settings", "", "JSON list of settings to try, each a mapping of the flags below")
    flags.DEFINE_string("output", "", "JSON file (default: docs/results/bench_mfu.json, or ..._TARGET_plan.json)")
    flags.DEFINE_enum("compile_for", None, list(TARGETS), "compile only, for one H200 or for eight TPU chips")
    for field in dataclasses.fields(Setting):
        define = flags.DEFINE_integer if field.type is int else flags.DEFINE_string
        define(field.name, None, f"for settings that do not say (default: {field.default})")


def main() -> None:
    """Tries each setting, prints a line for each, writes JSON."""
    from ml.errors import UserError

    args = flags.FLAGS
    settings = _settings(args)
    name = f"bench_mfu_{args.compile_for}_plan.json" if args.compile_for else "bench_mfu.json"
    output = Path(args.output or _ROOT / "docs" / "results" / name)
    document: dict[str, Any] = {"command": shlex.join(["python", "scripts/bench_mfu.py", *sys.argv[1:]])}
    results: list[dict] = []
    run = _plans(args.compile_for, args.size, settings) if args.compile_for else _runs(args.size, args.steps, settings)
    for setting, (common, result) in zip(settings, run, strict=True):
        document |= common
        results.append({"setting": dataclasses.asdict(setting)} | result)
        print(_line(setting, result), flush=True)
        result_file.write(output, document | {"results": results})
    print(f"written to {output}")
    if all("error" in result for result in results):
        raise UserError(f"no setting worked; the first said: {results[0]['error']}")


def _settings(args: flags.FlagValues) -> list[Setting]:
    from ml.config import build
    from ml.errors import UserError

    given = {field.name: args[field.name].value for field in dataclasses.fields(Setting)}
    given = {name: value for name, value in given.items() if value is not None}
    if not args.settings:
        chosen = DEFAULT_SETTINGS["tiny" if args.size == "tiny" else args.compile_for or "h200"]
        chosen = [{}] if given and len(chosen) > 1 else chosen
    else:
        try:
            chosen = json.loads(args.settings)
        except ValueError as error:
            raise UserError(
                f"--settings: not JSON ({error}); write a list such as '[{{\"batch_size\": 8}}]'"
            ) from error
        if not chosen or not isinstance(chosen, list) or not all(isinstance(entry, dict) for entry in chosen):
            raise UserError("--settings: must be a list of mappings, such as '[{\"batch_size\": 8}]'")
    return [build(Setting, given | entry, f"--settings[{i}]") for i, entry in enumerate(chosen)]


def _runs(size: str, steps: int, settings: list[Setting]) -> Iterator[tuple[dict, dict]]:
    """Measures each setting in a process of its own."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(_MEMORY_FRACTION)} | os.environ | {"PYTHONPATH": path}
    for setting in settings:
        request = json.dumps({"size": size, "steps": steps, "setting": dataclasses.asdict(setting)})
        command = [sys.executable, __file__, "--worker", request]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env)
        lines = done.stdout.splitlines()
        if done.returncode or not lines:
            yield {}, {"error": f"the process ended with status {done.returncode}; see its message above"}
        else:
            answer = json.loads(lines[-1])
            yield answer["common"], answer["result"]


def _plans(target_name: str, size: str, settings: list[Setting]) -> Iterator[tuple[dict, dict]]:
    """Compiles each setting for devices that are not there."""
    from ml.plan.topology import parse, use_compilers_alone

    target = parse(TARGETS[target_name])
    use_compilers_alone()
    devices = target.devices()
    common = {
        "device": f"{len(devices)} x {target.kind.device_kind}, compiled for without one",
        "versions": _versions(),
        "model": SIZES[size],
    }
    for setting in settings:
        try:
            yield common, plan(target, devices, size, setting)
        except Exception as error:
            yield common, {"error": _reason(error)}


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The body of a setting's process; returns what is common to all settings, and this one's result."""
    import jax

    from pallas_kernels.chips import peak_flops

    setting, devices = Setting(**request["setting"]), jax.devices()
    device_kind = devices[0].device_kind
    dtype = "float32" if devices[0].platform == "cpu" else "bfloat16"
    common = {
        "device": f"{len(devices)} x {device_kind}",
        "versions": _versions(),
        "model": SIZES[request["size"]],
        "dtype": dtype,
        "datasheet_flops": peak_flops(device_kind, dtype),
        "steps": f"{request['steps']} queued in each of {_ROUNDS} rounds, after {_WARMUP_STEPS}",
    }
    try:
        result = measure(request["size"], setting, request["steps"], dtype)
    except Exception as error:
        return {"common": common, "result": {"error": _reason(error)}}
    rate = result["model_flops_per_second"]
    result["mfu_of_matmul"] = rate / result["matmul_flops"]
    if common["datasheet_flops"]:
        result["mfu"] = rate / common["datasheet_flops"]
    return {"common": common, "result": result}


def measure(size: str, setting: Setting, steps: int, dtype: str) -> dict[str, Any]:
    """Times matrix products and then training; rates are those of one device."""
    import jax

    from ml.models.cost import parameter_count, train_flops_per_token
    from ml.parallel import place_batch
    from ml.train.memory import memory_use
    from ml.train.state import init_state

    matmul = matmul_flops(8192 if size != "tiny" else 128, dtype)
    program = make_program(size, setting, jax.devices(), dtype)
    with jax.set_mesh(program.rules.mesh):
        state = init_state(program.model, program.tx, program.rules, seed=0, ema=False)
        batches: list[dict[str, Any]] = []
        for seed in range(2):
            arrays = random_batch(program.config.model, setting, seed)
            batches.append(place_batch(arrays, program.rules, setting.microbatches))
            batches[-1].setdefault("segment_ids", None)
        start = time.perf_counter()
        step = program.step.lower(state, batches[0]).compile()
        compile_seconds = time.perf_counter() - start
        feed = itertools.cycle(batches)
        for _ in range(_WARMUP_STEPS):
            state, metrics = step(state, next(feed))
        jax.block_until_ready(state)
        seconds = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            for _ in range(steps):
                state, metrics = step(state, next(feed))
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - start) / steps)
        memory = memory_use(state, step)
    config, devices = program.config.model, program.rules.mesh.size
    tokens = setting.batch_size * config.max_length
    flops = train_flops_per_token(config, config.max_length // setting.documents)
    rate = tokens / statistics.median(seconds) / devices
    return {
        "parameters": parameter_count(config).total,
        "seconds_per_step": statistics.median(seconds),
        "seconds_per_step_range": [min(seconds), max(seconds)],
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "model_flops_per_second": rate * flops,
        "matmul_flops": matmul,
        "memory": dataclasses.asdict(memory) | {"predicted": memory.predicted},
        "loss": float(jax.device_get(metrics["loss"])),
        "compile_seconds": compile_seconds,
    }


def plan(target: Any, devices: Any, size: str, setting: Setting) -> dict[str, Any]:
    """Compiles a setting's step for ``devices``, which need not exist, and reads the memory it will take."""
    from ml.train.memory import memory_use

    program = make_program(size, setting, devices, "bfloat16")
    start = time.perf_counter()
    memory, available = memory_use(program.state, program.compile()), target.kind.usable_bytes
    return {
        "memory": dataclasses.asdict(memory) | {"predicted": memory.predicted, "of_device": available},
        "fits": memory.predicted <= available,
        "compile_seconds": time.perf_counter() - start,
    }


def make_program(size: str, setting: Setting, devices: Any, dtype: str) -> Any:
    """A setting's step (`ml.plan.program.Program`) on a mesh over which parameters are sharded."""
    from ml.config import build
    from ml.data import DataConfig
    from ml.models import TransformerConfig
    from ml.optim import OptimizerConfig, ScheduleConfig
    from ml.parallel import MeshConfig
    from ml.plan.program import assemble
    from ml.train.config import ExperimentConfig, TrainConfig

    fields = {k: v for k, v in dataclasses.asdict(setting).items() if k not in ("optimizer", "documents")}
    model = TransformerConfig(**SIZES[size])
    config = ExperimentConfig(
        model=model,
        data=DataConfig(sequence_length=model.max_length),
        optimizer=OptimizerConfig(setting.optimizer, learning_rate=1e-3, weight_decay=0.1, clip_norm=1.0),
        schedule=ScheduleConfig(kind="constant"),
        train=build(TrainConfig, fields | {"dtype": dtype}, "setting"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    program = assemble(config, devices)
    whole_rows = {"segment_ids": None} if setting.documents == 1 else {}
    return dataclasses.replace(program, batch=program.batch | whole_rows)


def random_batch(config: Any, setting: Setting, seed: int) -> dict[str, Any]:
    """NumPy arrays ``[batch_size, length]`` of rows cut into ``setting.documents`` documents of equal length."""
    import numpy as np

    shape = (setting.batch_size, config.max_length)
    document, position = np.divmod(np.arange(config.max_length), config.max_length // setting.documents)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (shape[0], shape[1] + 1), np.int32)
    last = np.append(document[1:] != document[:-1], False)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.broadcast_to(~last, shape).astype(np.float32),
        "positions": np.broadcast_to(position, shape).astype(np.int32),
    }
    if setting.documents > 1:
        batch["segment_ids"] = np.broadcast_to(document + 1, shape).astype(np.int32)
    return batch


def matmul_flops(width: int, dtype: str, products: int = 100, rounds: int = 5) -> float:
    """FLOP/s of one device on ``products`` square products in one program: the median over ``rounds``."""
    import jax
    import jax.numpy as jnp

    left, right = jax.random.split(jax.random.key(0))
    x = jax.random.normal(left, (width, width), dtype)
    w = jax.random.normal(right, (width, width), dtype) / jnp.asarray(width**0.5, dtype)  # products keep their size
    run = jax.jit(lambda x, w: jax.lax.fori_loop(0, products, lambda _, x: x @ w, x))
    jax.block_until_ready(run(x, w))
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run(x, w))
        seconds.append(time.perf_counter() - start)
    return products * 2 * width**3 / statistics.median(seconds)


def _line(setting: Setting, result: dict[str, Any]) -> str:
    differs = {k: v for k, v in dataclasses.asdict(setting).items() if v != getattr(Setting(), k)}
    name = " ".join(f"{k}={v}" for k, v in differs.items()) or "default"
    if "error" in result:
        return f"{name}: {result['error']}"
    memory = result["memory"]
    parts = {key: memory[key] for key in ("params", "opt_state", "temporary")}
    text = f"{memory['predicted'] / _GIB:.1f} GiB = " + " + ".join(f"{k} {v / _GIB:.1f}" for k, v in parts.items())
    if "fits" in result:
        return f"{name}: {text}: {'fits' if result['fits'] else 'DOES NOT FIT'}"
    if memory["measured_peak"] is not None:
        text += f", measured {memory['measured_peak'] / _GIB:.1f}"
    mfu = f"MFU {result['mfu']:.1%}, " if "mfu" in result else ""
    rate = f"{result['tokens_per_second']:,.0f} tokens/s, {result['model_flops_per_second'] / 1e12:.4g} TFLOP/s"
    matmul = f"{result['mfu_of_matmul']:.1%} of the matmul peak ({result['matmul_flops'] / 1e12:.4g})"
    return f"{name}: {rate} a device, {mfu}{matmul}; {text}"


def _reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return f"out of memory: {text[:300]}"
    return f"{type(error).__name__}: {text[:500]}"


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = ("jax", "jaxlib", "flax", "optax", "nvidia-cudnn-cu13", "libtpu")
    installed = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in names if name in installed}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
    else:
        define_flags()
        app.run(main, usage=_USAGE)
