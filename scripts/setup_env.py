"""Second half of ``scripts/setup_env.sh``: makes the environment with the interpreter that runs this file.

Standard library only. The environment is whole when ``VENV/.complete`` exists; that file goes first and comes last, so
an interrupted set-up is noticed and done again.
"""

import argparse
import fcntl
import pathlib
import re
import shutil
import subprocess
import sys
import time

OURS = ".made-by-setup"  # marks an environment that this script made, and may therefore delete
STAMP = ".complete"
LOG = "setup.log"
ATTEMPTS = 3
NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|Temporary failure in name resolution|Max retries exceeded"
    r"|connection broken|Network is unreachable|ConnectTimeout|ReadTimeout|ConnectionResetError|IncompleteRead"
    r"|ProxyError|SSLError"
)
DISK = re.compile(r"No space left on device|Errno 28|Disk quota exceeded|Errno 122")


class SetupError(Exception):
    """Why there is no environment, in one line."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for flag in ("root", "venv", "extras", "constraints", "key"):
        parser.add_argument(f"--{flag}", required=True)
    parser.add_argument("--explicit", action="store_true", help="the user chose this interpreter")
    args = parser.parse_args()
    root = pathlib.Path(args.root)
    venv = root / args.venv
    try:
        with open(root / f"{args.venv}.lock", "w") as lock:
            wait_for(lock)
            if not is_complete(venv, args.key, args.explicit):
                make(root, venv, args.extras, root / args.constraints, args.explicit)
                (venv / STAMP).write_text(f"{args.key}\n{sys.executable}\n")
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        hint = "free some space" if error.errno in (28, 122) else "mend that"
        print(f"set-up: {error.strerror}: {error.filename or venv}; {hint}, then run make again", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run make again to go on", file=sys.stderr)
        return 130
    return 0


def wait_for(lock) -> None:
    """Takes the lock, which the system gives back however this process ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say("another make is setting up the same environment; waiting for it")
        fcntl.flock(lock, fcntl.LOCK_EX)


def is_complete(venv: pathlib.Path, key: str, explicit: bool) -> bool:
    try:
        lines = (venv / STAMP).read_text().splitlines()
    except OSError:
        return False
    return lines[:1] == [key] and (not explicit or lines[1:2] == [sys.executable]) and runs(venv)


def runs(venv: pathlib.Path) -> bool:
    try:
        probe = [str(venv / "bin/python"), "-I", "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make(root: pathlib.Path, venv: pathlib.Path, extras: str, constraints: pathlib.Path, explicit: bool) -> None:
    """Creates ``venv`` or brings it up to date.

    A half-made environment of ours is thrown away; one that somebody else made is never deleted, only installed into.
    """
    begin = time.monotonic()
    ours, whole = (venv / OURS).exists(), (venv / STAMP).exists()
    (venv / STAMP).unlink(missing_ok=True)
    if ours and not (whole and runs(venv) and (not explicit or made_with(venv))):
        shutil.rmtree(venv)
    if venv.exists() and not (venv / OURS).exists() and any(venv.iterdir()):
        if not runs(venv):
            raise SetupError(f"{venv} exists, was not made by make and has no working Python >= 3.11; remove it")
    elif not venv.exists():
        say(f"making {venv.name} with Python {sys.version.split()[0]}")
        venv.mkdir()
        (venv / OURS).touch()
        command = [sys.executable, "-I", "-m", "venv", str(venv)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SetupError(explain(done.stdout + done.stderr, venv))
    for attempt in range(1, ATTEMPTS + 1):
        output, status = install(root, venv, extras, constraints)
        if status == 0:
            break
        if attempt == ATTEMPTS or DISK.search(output) or not NETWORK.search(output):
            raise SetupError(explain(output, venv))
        say(f"the network failed; trying again ({attempt + 1} of {ATTEMPTS})")
    say(f"{venv.name} is ready ({time.monotonic() - begin:.0f} s)")


def made_with(venv: pathlib.Path) -> bool:
    """Whether ``venv`` has the version of the interpreter that runs this file."""
    command = [str(venv / "bin/python"), "-I", "-c", "import sys; print(sys.version)"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() == sys.version.strip()


def install(root: pathlib.Path, venv: pathlib.Path, extras: str, constraints: pathlib.Path) -> tuple[str, int]:
    """Runs pip, showing how far it is. Returns its output, kept in ``VENV/setup.log`` too, and its exit status."""
    command = [str(venv / "bin/python"), "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--retries=5", "--progress-bar=off", f"--constraint={constraints}", f"--editable={root}[{extras}]"]
    total = sum(bool(line.strip()) and not line.startswith("#") for line in constraints.read_text().splitlines())
    lines, collected, shown = [], 0, time.monotonic()
    with open(venv / LOG, "w") as log:
        pip = subprocess.Popen(
            command, cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert pip.stdout is not None
        for line in pip.stdout:
            lines.append(line)
            log.write(line)
            collected += line.startswith("Collecting ")
            doing = line.startswith(("Collecting ", "Installing collected"))
            if doing and (sys.stderr.isatty() or time.monotonic() - shown > 20):
                shown = time.monotonic()
                what = "installing" if line.startswith("Installing") else line.split()[1]
                progress(f"set-up: {collected} of at most {total} packages: {what}")
        pip.wait()
    if sys.stderr.isatty():
        progress("")
    return "".join(lines), pip.returncode


def explain(output: str, venv: pathlib.Path) -> str:
    """One line that says what went wrong in ``output``, a failed command's, and the mend."""
    log = f"; the whole story is in {venv / LOG}" if (venv / LOG).exists() else ""
    if DISK.search(output):
        free = shutil.disk_usage(venv).free / 1e9
        return f"the disk is full ({free:.1f} GB free, about 2 GB needed); free some space, then run make again"
    if NETWORK.search(output):
        return (
            f"the package index cannot be reached; check the network or pip's index settings, then run make again{log}"
        )
    errors = [line for line in output.splitlines() if line.lower().startswith("error")]
    return (errors or output.strip().splitlines() or ["pip failed without a word"])[-1].strip() + log


def progress(text: str) -> None:
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print("\r" + text[:width].ljust(width) + ("" if text else "\r"), end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def say(text: str) -> None:
    if sys.stderr.isatty():
        progress("")
    print(f"set-up: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
