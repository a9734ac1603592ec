"""Ranks the arrangements of an experiment on a machine, and prints the flags of the best."""

import app
import config_flag
from absl import flags

_USAGE = """
Searches mesh, layout, microbatches and rematerialization that fit a machine, fastest first by a model of its links.
It predicts; it does not measure. --check compiles the best ones for the machine, as scripts/preflight.py does.

  python scripts/plan.py --config=configs/lm/llama3_8b.py --topology=v5e:16x16 --top=5 --check=1
"""

if __name__ == "__main__":
    config_flag.define()
    flags.DEFINE_string("topology", None, "the machine: v5e:16x16, 2*v5p:4x4x4 (two slices), h200:8 ...")
    flags.DEFINE_integer("slices", 1, "number of slices, if --topology does not say", lower_bound=1)
    flags.DEFINE_integer("global_batch", None, "sequences in a batch (default: config.train.batch_size)", lower_bound=1)
    flags.DEFINE_integer("top", 10, "how many to show", lower_bound=1)
    flags.DEFINE_integer("check", 0, "compile the first N for the machine", lower_bound=0)
    flags.DEFINE_float("efficiency", 0.6, "assumed share of peak FLOP/s of matrix products", 0.01, 1.0)


def main() -> None:
    """Reads the flags, searches, prints."""
    from ml.config import build
    from ml.errors import UserError
    from ml.plan import topology as topologies

    args = flags.FLAGS
    if not args.topology:
        raise UserError("--topology is missing; name the machine, such as --topology=v5e:16x16")
    machine = topologies.parse(args.topology, args.slices)
    topologies.use_compilers_alone()

    from rich.console import Console
    from rich.table import Table

    from ml.plan.mends import changed
    from ml.plan.planner import search
    from ml.plan.preflight import preflight
    from ml.train.config import ExperimentConfig

    values = config_flag.load().to_dict()
    if args.global_batch:
        values["train"]["batch_size"], values["train"]["microbatches"] = args.global_batch, 1
    config = build(ExperimentConfig, values)
    plans = search(config, machine, efficiency=args.efficiency)
    console = Console()
    tokens = config.tokens_per_step
    console.print(
        f"{len(plans)} arrangements of {tokens:,} tokens on {machine.device_count} x {machine.kind.device_kind} fit. "
        f"Predicted, not measured: matrix products at {args.efficiency:.0%} of peak, weights' transfers overlapped.",
        soft_wrap=True,
    )
    table = Table()
    for name in ("", "mesh", "layout", "micro-\nbatches", "remat", "GiB", "s/step", "MFU", "waits for"):
        text = name in ("mesh", "layout", "remat", "waits for")
        table.add_column(name, justify="left" if text else "right", overflow="fold")
    for rank, plan in enumerate(plans[: args.top], 1):
        keys, latency = plan.overrides, plan.latency
        degrees = [f"{k.removeprefix('mesh.')}={v}" for k, v in keys.items() if isinstance(v, int) and "mesh." in k]
        waits = {"activations": latency.activations, "once a step": latency.once, "bubble": latency.bubble}
        waits["weights"] = max(0.0, latency.weights - latency.compute)
        longest = max(waits, key=lambda name: waits[name])
        table.add_row(
            str(rank),
            " ".join(entry for entry in degrees if not entry.endswith("=1")) or "one device",
            keys["mesh.layout"],
            str(keys["train.microbatches"]),
            keys["train.remat"],
            f"{plan.memory.total / 2**30:.1f}",
            f"{latency.total:.3g}",
            f"{plan.mfu:.0%}",
            f"{longest} {waits[longest]:.2g} s" if waits[longest] > 0 else "-",
        )
    console.print(table)
    batch = f" --config.train.batch_size={config.train.batch_size}" if args.global_batch else ""
    for rank, plan in enumerate(plans[: args.top], 1):
        console.print(f"{rank}: {plan.flags}{batch}", soft_wrap=True)
    for rank, plan in enumerate(plans[: args.check], 1):
        report = preflight(changed(config, plan.overrides), machine)
        console.print(f"{rank} compiled: {report.verdict()}; formula {plan.memory.total / 2**30:.1f}", soft_wrap=True)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
