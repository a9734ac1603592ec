"""Trains the same Llama shapes with this project and with PyTorch + transformers, taking turns, and compares.

Each side lives in a process of its own and works only while the other waits. A turn is a few optimizer steps on random
tokens: float32, AdamW, the same batch, the same number of threads. Speed is the median over turns; memory is the peak
resident size of the process, compilation included.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import app
import machine
import result_file
from absl import flags

_USAGE = """
Compares training speed and memory with a peer, interleaved in one run; writes docs/results/bench_train.json.

  make env-parity    # PyTorch and transformers, in an environment of their own
  python scripts/bench_train.py --peer=transformers --peer_python=.venv-parity/bin/python
"""

# name -> architecture, sequences in a batch, tokens in a sequence
SIZES = {
    "4m": {
        "vocab_size": 4096,
        "num_layers": 4,
        "embed_dim": 256,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 32,
        "mlp_dim": 768,
        "batch": 16,
        "length": 256,
    },
    "32m": {
        "vocab_size": 8192,
        "num_layers": 8,
        "embed_dim": 512,
        "num_heads": 8,
        "num_kv_heads": 4,
        "head_dim": 64,
        "mlp_dim": 1536,
        "batch": 8,
        "length": 512,
    },
}
_LEARNING_RATE, _WEIGHT_DECAY = 1e-3, 0.1
_ROOT = Path(__file__).resolve().parents[1]


def define_flags() -> None:
    """Defines the script's flags."""
    flags.DEFINE_enum("peer", "transformers", ["transformers"], "whom to compare with")
    flags.DEFINE_string("peer_python", ".venv-parity/bin/python", "interpreter that has torch and transformers")
    flags.DEFINE_integer("threads", 2, "threads (and cores) of each side", lower_bound=1)
    flags.DEFINE_integer("turns", 8, "turns of each side at each size", lower_bound=2)
    flags.DEFINE_integer("steps", 3, "optimizer steps in a turn", lower_bound=1)
    flags.DEFINE_list("sizes", list(SIZES), "which of the sizes")
    flags.DEFINE_string("output", "docs/results/bench_train.json", "where to write the result")


def main() -> None:
    """Runs both sides at each size, prints a table, writes JSON."""
    from ml.errors import UserError

    args = flags.FLAGS
    peer_python = (_ROOT / args.peer_python).absolute()
    if not peer_python.exists():
        raise UserError(f"--peer_python={args.peer_python}: no such interpreter; `make env-parity` makes it")
    if unknown := set(args.sizes) - SIZES.keys():
        raise UserError(f"--sizes={unknown.pop()}: choose from {', '.join(SIZES)}")
    results = {}
    for name in args.sizes:
        sides = {"megabatch": Side("jax", sys.executable, name), "transformers": Side("torch", str(peer_python), name)}
        for _ in range(args.turns):
            for side in sides.values():
                side.turn(args.steps)
        results[name] = {"shape": SIZES[name]} | {key: side.close() for key, side in sides.items()}
        ours, theirs = results[name]["megabatch"], results[name]["transformers"]
        results[name]["speed_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        results[name]["memory_ratio"] = ours["peak_memory_mib"] / theirs["peak_memory_mib"]
        for key in sides:
            side_result = results[name][key]
            speed, memory = side_result["tokens_per_second"], side_result["peak_memory_mib"]
            print(f"{name:>5}  {key:<14}{speed:>10,.0f} tokens/s{memory:>8,.0f} MiB  loss {side_result['loss']:.3f}")
        speed_ratio, memory_ratio = results[name]["speed_ratio"], results[name]["memory_ratio"]
        print(f"{name:>5}  ratio{speed_ratio:>18.2f} x speed{memory_ratio:>9.2f} x memory")
    document = {
        "command": "python scripts/bench_train.py " + " ".join(sys.argv[1:]),
        "device": f"{args.threads} threads of {machine.cpu()}",
        "settings": {"dtype": "float32", "optimizer": "adamw", "turns": args.turns, "steps_per_turn": args.steps},
        "results": results,
    }
    output = Path(args.output)
    result_file.write(output, document)
    print(f"written to {output}")


class Side:
    """One framework in its own process, answering a line of JSON for each line it is sent."""

    def __init__(self, framework: str, python: str, size: str):
        self._framework, threads = framework, flags.FLAGS.threads
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(_ROOT)}
        # A cached executable would hide the memory that compiling takes.
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        command = ["taskset", "-c", cores, python, __file__, "--worker", framework, size, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._rates: list[float] = []
        self._ask(1)  # compiles and warms up

    def turn(self, steps: int) -> None:
        """Lets the side train for some steps."""
        self._rates.append(self._ask(steps)["tokens_per_second"])

    def close(self) -> dict:
        """Ends the process and returns what it measured."""
        last = self._ask(0)
        self._process.communicate("\n")
        spread = statistics.quantiles(self._rates, n=4)
        return last | {
            "tokens_per_second": statistics.median(self._rates),
            "tokens_per_second_quartiles": [spread[0], spread[2]],
        }

    def _ask(self, steps: int) -> dict:
        from ml.errors import UserError

        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"the {self._framework} side's process ended; see its message above")
        return json.loads(answer)


def work(framework: str, size: str, threads: int) -> None:
    """The body of a side's process."""
    run, version = (_jax_steps if framework == "jax" else _torch_steps)(SIZES[size], threads)
    tokens, loss = SIZES[size]["batch"] * SIZES[size]["length"], float("nan")
    for line in sys.stdin:
        if not line.strip():
            break
        steps = int(line)
        start = time.perf_counter()
        for _ in range(steps):
            loss = run()
        answer = {"version": version, "loss": float(loss), "peak_memory_mib": _peak_memory_mib()}
        elapsed = time.perf_counter() - start
        print(json.dumps(answer | {"tokens_per_second": steps * tokens / elapsed}), flush=True)


def _jax_steps(shape: dict, threads: int):
    """One optimizer step of this project's own train step, as `scripts/train.py` compiles it."""
    import jax
    import numpy as np

    from ml.models import Transformer, TransformerConfig, logical_axes
    from ml.optim import OptimizerConfig, ScheduleConfig, make_optimizer
    from ml.parallel import MeshConfig, Rules, place_batch
    from ml.train.config import TrainConfig
    from ml.train.state import init_state
    from ml.train.step import make_train_step

    batch_size, length = shape["batch"], shape["length"]
    config = TransformerConfig(max_length=length, **{k: v for k, v in shape.items() if k not in ("batch", "length")})
    rules = Rules.make(MeshConfig())
    jax.set_mesh(rules.mesh)
    train_config = TrainConfig(batch_size=batch_size, loss_chunk=128)
    model = Transformer(config, remat=train_config.remat, place=rules.spec)
    optimizer = OptimizerConfig("adamw", learning_rate=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    tx, schedule = make_optimizer(
        optimizer, ScheduleConfig(kind="constant"), total_steps=1000, batch_size=batch_size, axes=logical_axes(config)
    )
    state = init_state(model, tx, rules, seed=0, ema=False)
    step = jax.jit(make_train_step(model, tx, schedule, train_config, rules), donate_argnums=0)
    random = np.random.default_rng(0)

    def run() -> float:
        nonlocal state
        tokens = random.integers(0, config.vocab_size, (batch_size, length + 1), np.int32)
        batch = {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "loss_mask": np.ones((batch_size, length), np.float32),
            "segment_ids": np.ones((batch_size, length), np.int32),
            "positions": np.broadcast_to(np.arange(length, dtype=np.int32), (batch_size, length)),
        }
        state, metrics = step(state, place_batch(batch, rules, 1))
        return jax.device_get(metrics["loss"])

    return run, f"jax {jax.__version__}, Python {platform.python_version()}"


def _torch_steps(shape: dict, threads: int):
    """One optimizer step of `transformers.LlamaForCausalLM` with PyTorch's fused AdamW, as its users write it."""
    import numpy as np
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["embed_dim"],
        intermediate_size=shape["mlp_dim"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        max_position_embeddings=shape["length"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True)
    random = np.random.default_rng(0)

    def run() -> float:
        tokens = torch.from_numpy(random.integers(0, shape["vocab_size"], (shape["batch"], shape["length"] + 1)))
        # `shift_labels`: the same targets as the other side's, one for each of `length` positions.
        loss = model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], shift_labels=tokens[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return run, f"{version}, Python {platform.python_version()}"


def _peak_memory_mib() -> float:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        define_flags()
        app.run(main, usage=_USAGE)
