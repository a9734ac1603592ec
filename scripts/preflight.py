"""Proves a job without its machine: compiles the train step for it, and says what that needs, sends, is bound by."""

import json
import shlex
import sys
from pathlib import Path

import app
import config_flag
from absl import flags

_USAGE = """
Compiles an experiment's train step for devices that are not there: memory, collectives, FLOPs, the bound on MFU.
Exit status 1 and the mends if it does not fit. It predicts; it does not measure.

  python scripts/preflight.py --config=configs/lm/llama3_8b.py --topology=v5e:16x16
  python scripts/preflight.py --config=configs/lm/llama3_8b.py --topology=2*v5e:16x16 --config.mesh.slices=2 \\
      --config.mesh.data=2 --json=out.json
"""

if __name__ == "__main__":
    config_flag.define()
    flags.DEFINE_string("topology", None, "the machine: v5e:16x16, 2*v5p:4x4x4 (two slices), h200:8 ...")
    flags.DEFINE_integer("slices", 1, "number of slices, if --topology does not say", lower_bound=1)
    flags.DEFINE_string("layout", None, "short for --config.mesh.layout")
    flags.DEFINE_string("json", None, "write the report to this file as JSON; --json=- prints it instead of the tables")
    flags.DEFINE_boolean("serve", False, "preflight serving instead of training (once the engine's decode step exists)")


def main() -> None:
    """Reads the flags, compiles, reports."""
    from ml.config import build
    from ml.errors import UserError
    from ml.plan import topology as topologies

    args = flags.FLAGS
    if args.serve:
        raise UserError("--serve: the serving engine has no decode step of its own yet; leave it out to check training")
    if not args.topology:
        raise UserError("--topology is missing; name the machine, such as --topology=v5e:16x16")
    if args.json and args.json != "-" and not Path(args.json).absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: there is no such folder; make it first")
    machine = topologies.parse(args.topology, args.slices)
    topologies.use_compilers_alone()

    from rich.console import Console

    from ml.plan.preflight import preflight
    from ml.train.config import ExperimentConfig

    values = config_flag.load().to_dict()
    if args.layout is not None:
        values["mesh"]["layout"] = args.layout
    report = preflight(build(ExperimentConfig, values), machine)
    command = shlex.join(["python", "scripts/preflight.py", *sys.argv[1:]])
    text = json.dumps({"command": command} | report.to_json(), indent=1)
    if args.json == "-":
        print(text)
    else:
        report.print(Console())
    if args.json and args.json != "-":
        Path(args.json).write_text(text + "\n")
    if not report.fits:
        if args.json == "-":
            print(report.verdict(), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
