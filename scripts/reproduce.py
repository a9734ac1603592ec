"""Puts papers' claims to the test: runs studies, keeps what they found, and rebuilds the table of all of them."""

import shlex
import sys
import time
from pathlib import Path

import app
import machine
from absl import flags

_USAGE = """
Runs studies (ml/studies), writes JSON and a plot of each to docs/results/studies, and rebuilds docs/papers.md.

  python scripts/reproduce.py --list
  python scripts/reproduce.py --study=lamb_batch_size
  python scripts/reproduce.py --all                  # all of them, each within minutes of CPU
  python scripts/reproduce.py --table                # only the table, from the results that are there
"""

if __name__ == "__main__":
    flags.DEFINE_list("study", [], "the study to run, or several, with commas")
    flags.DEFINE_boolean("all", False, "run all of them")
    flags.DEFINE_boolean("list", False, "say which there are")
    flags.DEFINE_boolean("table", False, "only rebuild the table")
    flags.DEFINE_enum("budget", "cpu", ["cpu", "gpu"], "what a study may spend")
    flags.DEFINE_string("output", "docs/results/studies", "folder of the results")
    flags.DEFINE_string("papers", "docs/papers.md", "the table")


def main() -> None:
    """Reads the flags; runs what they name."""
    from ml.errors import UserError, nearest
    from ml.studies.registry import studies

    args = flags.FLAGS
    chosen = [name for name in ("study", "all", "list", "table") if getattr(args, name)]
    if len(chosen) != 1:
        what = "--" + " and --".join(chosen) + ": give one of them" if chosen else "nothing to do: give one"
        raise UserError(f"{what} (--study=NAME, --all, --list or --table)")
    valid = studies()
    if args.list:
        width = max(map(len, valid), default=0)
        for name, summary in valid.items():
            print(f"{name:<{width}}  {summary}")
        return
    output, papers = Path(args.output), Path(args.papers)
    if args.table:
        _rebuild(output, papers)
        return
    names = list(valid) if args.all else args.study
    for name in names:
        if name not in valid:
            raise UserError(f"--study={name}: there is no such study; {nearest(name, valid)}")
    _use_device(args.budget)
    for name in names:
        _reproduce(name, args.budget, output)
        _rebuild(output, papers)


def _use_device(budget: str) -> None:
    """CPU budgets run on the CPU everywhere, so that their results mean the same; GPU budgets need a GPU."""
    import jax

    from ml.errors import UserError

    if budget == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif jax.default_backend() != "gpu":
        raise UserError(f"--budget=gpu: JAX finds no GPU here, only {jax.default_backend()}; give --budget=cpu")


def _reproduce(name: str, budget: str, output: Path) -> None:
    """Runs one study; its files appear, whole, when it is done."""
    import jax

    from ml.studies.plot import plot_outcome
    from ml.studies.record import Record, write_record
    from ml.studies.registry import load
    from ml.studies.table import measured

    print(f"{name}: running, budget {budget}", file=sys.stderr, flush=True)
    start = time.monotonic()
    outcome = load(name)(budget)  # type: ignore[arg-type]
    record = Record(
        study=name,
        budget=budget,  # type: ignore[arg-type]
        command=shlex.join(["python", "scripts/reproduce.py", f"--study={name}", f"--budget={budget}"]),
        device=machine.device(jax.devices()[0].device_kind),
        versions=machine.versions(),
        seconds=round(time.monotonic() - start, 1),
        outcome=outcome,
    )
    picture = output / f"{record.stem}.png"
    if outcome.panels:
        plot_outcome(outcome, picture)
    path = write_record(record, output)
    print(f"{name}: {outcome.claim}")
    print(f"{name}: {measured(outcome)}")
    print(f"{name}: {'holds' if outcome.holds else 'does not hold: ' + outcome.reason}")
    print(f"{name}: {record.seconds:.0f} s; written to {path}" + (f" and {picture}" if outcome.panels else ""))


def _rebuild(output: Path, papers: Path) -> None:
    from ml.studies.table import write_table

    write_table(output, papers)
    print(f"table: {papers}")


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
