"""Everything that needs an NVIDIA GPU, in the order in which it can be trusted: `make gpu`.

Standard library only; runs with the machine's own Python, its JAX and its torch, and needs no network. Packages that it
lacks are taken from wheels/, where ``--download`` (`make gpu-wheels`) has put them elsewhere. Each step has a budget of
time; one that fails or exceeds it costs no other, and the exit status says so at the end.
"""

import argparse
import dataclasses
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / ".gpu-packages"
# import name -> what pip calls it. Pure Python, for a machine that has JAX.
PURE = {
    "absl": "absl-py",
    "jaxtyping": "jaxtyping",
    "wadler_lindig": "wadler-lindig",
    "pytest": "pytest",
    "iniconfig": "iniconfig",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "pygments": "Pygments",
}
# NVIDIA's assembler, which JAX prefers to that on the PATH: before CUDA 13.3 it may corrupt register operands.
ASSEMBLER = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
# Where tests marked `gpu` are; others import more than such a machine may have.
_TESTS = ("tests/pallas_kernels", "tests/scripts/test_bench_kernels.py")
PYTHON_OF_THE_MACHINE = "3.12"


@dataclasses.dataclass(frozen=True)
class Step:
    """A step.

    Attributes:
      name: of its log too.
      command: arguments of the machine's Python.
      seconds: after which it is stopped.
    """

    name: str
    command: tuple[str, ...]
    seconds: int


def steps(output: str) -> list[Step]:
    """All of them; their budgets together are less than ten minutes."""

    def bench(kernel: str, seconds: int) -> Step:
        # No case is begun late: one takes up to 20 s, most of them for compilation.
        begun = str(seconds - 25)
        options = ("--peers", f"--budget={begun}", f"--output={output}")
        return Step(f"bench_{kernel}", ("scripts/bench_kernels.py", f"--kernel={kernel}", *options), seconds)

    one = ("--kernel=hazard", f"--output={output}")
    return [
        Step("hazard", ("scripts/bench_kernels.py", *one), 45),
        Step("ceilings", ("scripts/bench_kernels.py", "--kernel=ceilings", f"--output={output}"), 35),
        Step("tests", ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *_TESTS), 120),
        bench("paged", 140),
        bench("flash", 140),
        bench("shared_prefix", 110),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--download", action="store_true", help="fill wheels/ for a machine without a network, and end")
    parser.add_argument("--output", default="docs/results", help="folder of results")
    parser.add_argument("--logs", default="runs/gpu", help="folder of the steps' logs")
    parser.add_argument("--only", default="", help="names of steps, with commas between them; all by default")
    parser.add_argument("--platform", default="cuda", help="for JAX; cpu tries the steps out where there is no GPU")
    args = parser.parse_args()
    if args.download:
        return download()
    chosen = [step for step in steps(args.output) if not args.only or step.name in args.only.split(",")]
    if unknown := set(filter(None, args.only.split(","))) - {step.name for step in chosen}:
        parser.error(f"--only={','.join(sorted(unknown))}: no such step")
    begin = time.monotonic()
    logs = ROOT / args.logs
    logs.mkdir(parents=True, exist_ok=True)
    environment = prepare(args.platform)
    outcomes = {step.name: run(step, environment, logs) for step in chosen}
    print(f"\n{time.monotonic() - begin:.0f} s in all; results in {args.output}, logs in {args.logs}")
    for name, outcome in outcomes.items():
        print(f"  {name:<20} {outcome}")
    return 0 if all(outcome == "passed" for outcome in outcomes.values()) else 1


def prepare(platform: str) -> dict[str, str]:
    """Unpacks what is missing, and returns the environment of the steps."""
    environment = os.environ | {"JAX_PLATFORMS": platform, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    environment.setdefault("MEGABATCH_CACHE_DIR", str(ROOT / "runs/gpu/cache"))
    wheels = ROOT / "wheels"
    if wheels.is_dir():
        here = {path.name.split("-")[0].lower().replace("_", "-") for path in wheels.glob("*.whl")}
        missing = [name for module, name in PURE.items() if importlib.util.find_spec(module) is None]
        wanted = [name for name in (*missing, *ASSEMBLER) if name.lower() in here]
        if wanted:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
            command += ["--find-links", str(wheels), "--target", str(PACKAGES), *wanted]
            subprocess.run(command, check=False)
    cuda = PACKAGES / "nvidia/cu13"
    if (cuda / "bin/ptxas").exists():
        (cuda / "bin/ptxas").chmod(0o755)
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_gpu_cuda_data_dir={cuda}".strip()
        environment["PATH"] = f"{cuda / 'bin'}{os.pathsep}{environment['PATH']}"
    paths = [str(ROOT), str(PACKAGES), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return environment


def run(step: Step, environment: dict[str, str], logs: Path) -> str:
    """Runs a step, copying what it prints to its log; returns how it ended, in words."""
    print(f"\n=== {step.name} (at most {step.seconds} s): python {' '.join(step.command)}", flush=True)
    begin = time.monotonic()
    log = logs / f"{step.name}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    text = log.read_text(errors="replace").strip().splitlines()
    print("\n".join(text[-25:]), flush=True)
    print(f"=== {step.name}: {time.monotonic() - begin:.0f} s", flush=True)
    if status is None:
        return f"stopped after {step.seconds} s; see {log}"
    return "passed" if status == 0 else f"failed with status {status}; see {log}"


def download() -> int:
    """Fills wheels/ with what a machine of that Python may lack, at the versions that were tested."""
    wheels = ROOT / "wheels"
    pins = (ROOT / "constraints/py312.txt").read_text().splitlines()
    shutil.rmtree(wheels, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
    command += ["--only-binary=:all:", f"--python-version={PYTHON_OF_THE_MACHINE}", "--platform=manylinux_2_28_x86_64"]
    command += [
        "--platform=manylinux_2_27_x86_64",
        "--platform=manylinux_2_17_x86_64",
        "--platform=manylinux2014_x86_64",
    ]
    wanted = {name.lower() for name in (*PURE.values(), *ASSEMBLER)}
    named = [pin for pin in pins if pin.split("==")[0].lower().replace("_", "-") in wanted]
    done = subprocess.run([*command, *named], check=False)
    if done.returncode == 0:
        size = sum(path.stat().st_size for path in wheels.iterdir()) / 1e6
        print(f"{len(named)} packages, {size:.0f} MB, in {wheels}; copy the folder along with the sources")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
