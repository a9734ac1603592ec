"""Says which global batch, learning rate, warm-up, steps and microbatches to train an experiment with, and why."""

import json
import math
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import app
import config_flag
from absl import flags

if TYPE_CHECKING:
    from ml.plan.advice import Advice, Number

_USAGE = """
Recommends global batch, peak learning rate, warm-up, steps and microbatch split for an experiment, each number with
its source. --measure first trains some steps to measure the gradient's noise scale.

  python scripts/advise.py --config=configs/lm/llama3_8b.py --tokens=1e11 --topology=v5p:8x8x8
  python scripts/advise.py --config=configs/lm/quickstart.py --tokens=2M --measure
"""
_SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}

if __name__ == "__main__":
    config_flag.define()
    flags.DEFINE_string("tokens", None, "tokens of the whole training: 20000000, 1e11, 100B ...")
    flags.DEFINE_string(
        "topology", None, "the machine: v5e:16x16, h200:8 ... (default: this one, split as the config is)"
    )
    flags.DEFINE_integer("slices", 1, "number of slices, if --topology does not say", lower_bound=1)
    flags.DEFINE_integer("global_batch", None, "sequences in a batch, if that is settled", lower_bound=1)
    flags.DEFINE_boolean("measure", False, "train some steps first, to measure the gradient's noise scale")
    flags.DEFINE_integer("probe_steps", 100, "how many steps --measure trains", lower_bound=1)
    flags.DEFINE_string("workdir", None, "a new folder to keep the probe in (default: it is deleted)")
    flags.DEFINE_boolean("check", False, "compile the advised step for --topology, as scripts/preflight.py does")
    flags.DEFINE_string("json", None, "write the advice to this file as JSON; --json=- prints it instead of the table")


def main() -> None:
    """Reads the flags, measures if asked to, advises, prints."""
    from ml.config import build
    from ml.errors import UserError
    from ml.plan import topology as topologies

    args = flags.FLAGS
    tokens = _tokens(args.tokens)
    if args.json and args.json != "-" and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no such folder; make it first")
    if args.workdir and not args.measure:
        raise UserError("--workdir is for the probe of --measure; give both or neither")
    if args.workdir and Path(args.workdir).exists() and any(Path(args.workdir).iterdir()):
        raise UserError(f"--workdir={args.workdir} is not empty; name a new folder for the probe")
    if args.check and not args.topology:
        raise UserError("--check compiles for a --topology; name one")
    machine = topologies.parse(args.topology, args.slices) if args.topology else None
    if machine is not None and not args.measure:
        topologies.use_compilers_alone()

    from ml.parallel import Rules
    from ml.plan.advice import advise
    from ml.plan.mends import changed
    from ml.plan.preflight import preflight
    from ml.plan.probe import measure_noise_scale
    from ml.train.config import ExperimentConfig

    config = build(ExperimentConfig, config_flag.load().to_dict())
    shards = 1 if machine is not None else Rules.make(config.mesh).batch_shards
    settled = {"topology": machine, "global_batch": args.global_batch, "batch_shards": shards}
    advice = advise(config, tokens, **settled)  # whatever is wrong is said before anything is trained
    noise = None
    if args.measure:
        with tempfile.TemporaryDirectory(prefix="megabatch_probe_") as folder:
            noise = measure_noise_scale(config, args.workdir or folder, steps=args.probe_steps)
        advice = advise(config, tokens, noise=noise, **settled)
    report = None
    if machine is not None and args.check:
        topologies.use_compilers_alone()
        report = preflight(changed(config, advice.overrides), machine)
    values = {
        "command": shlex.join(["python", "scripts/advise.py", *sys.argv[1:]]),
        "tokens": advice.tokens,
        "parameters": advice.parameters,
        "numbers": {one.name: _number(one) for one in advice.numbers},
        "notes": advice.notes,
        "overrides": advice.overrides,
        "flags": advice.flags,
    }
    if report is not None:
        values["compiled"] = report.to_json()
    text = json.dumps(values, indent=1)
    if args.json == "-":
        print(text)
    else:
        _print(advice)
        if report is not None:
            print(f"compiled: {report.verdict()}")
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")


def _tokens(text: str | None) -> int:
    from ml.errors import UserError

    if not text:
        raise UserError("--tokens is missing; say how many to train on, such as --tokens=1e11 or --tokens=100B")
    number, factor = text, 1.0
    if text[-1].lower() in _SUFFIXES:
        number, factor = text[:-1], _SUFFIXES[text[-1].lower()]
    try:
        value = float(number) * factor
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1):
        raise UserError(f"--tokens={text}: not a number of tokens; write 20000000, 1e11 or 100B")
    return round(value)


def _number(one: "Number") -> dict[str, object]:
    bounds = one.interval and [
        bound if math.isfinite(bound) else None for bound in one.interval
    ]  # JSON has no infinity
    return {"value": one.value, "unit": one.unit, "interval": bounds, "source": one.source}


def _print(advice: "Advice") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"{advice.tokens:,} tokens, {advice.parameters:,} parameters outside of the tables", highlight=False)
    table = Table()
    for name in ("", "value", "95%", "source"):
        table.add_column(name, justify="right" if name in ("value", "95%") else "left", overflow="fold")
    for one in advice.numbers:
        bounds = " to ".join(map(_show, one.interval)) if one.interval else ""
        table.add_row(one.name, f"{_show(one.value)} {one.unit}".strip(), bounds, one.source)
    console.print(table)
    for note in advice.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    console.print(advice.flags, soft_wrap=True, highlight=False)


def _show(value: float) -> str:
    if isinstance(value, int) or (value >= 1000 and math.isfinite(value)):
        return f"{value:,.0f}"
    return f"{value:.3g}"


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
