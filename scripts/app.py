"""How every script starts: flags in, one call down; a user's mistake ends in one line and exit status 2."""

import errno
import glob
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

# Before anything that another interpreter than the environment's would stumble over.
if sys.version_info < (3, 11):  # noqa: UP036
    print(
        "error: this is Python %d.%d (%s); 3.11 or newer is needed: `make env` finds one, then . .venv/bin/activate"  # noqa: UP031
        % (*sys.version_info[:2], sys.executable),
        file=sys.stderr,
    )
    sys.exit(2)
try:
    import absl.logging
    from absl import app, flags

    from ml.errors import UserError
except ModuleNotFoundError as missing:
    print(
        f"error: {missing.name} is not installed for {sys.executable}: `make env`, then . .venv/bin/activate",
        file=sys.stderr,
    )
    sys.exit(2)

# Packages that not everyone needs, and the extra of setup.cfg that brings them.
_EXTRAS = {
    "fastapi": "serve",
    "llguidance": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
    "libtpu": "preflight",
    "nbclient": "notebooks",
    "nbformat": "notebooks",
    "openai": "chat",
}


def run(main: Callable[..., None], *, usage: str, takes_words: bool = False) -> None:
    """Parses flags and runs ``main``.

    Args:
      main: takes nothing; reads its flags itself.
      usage: what ``--help`` prints above the flags: one sentence and an example.
      takes_words: whether the command line may hold words that are no flags; ``main`` then takes their list.
    """
    _quiet_without_tpu()
    logging.getLogger("jax._src.xla_bridge").addFilter(_without_noise)
    for name in ("httpx", "httpx2"):  # each request would be a line among answers
        logging.getLogger(name).setLevel(logging.WARNING)
    absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    app.run(
        lambda argv: _guard((lambda: main(argv[1:])) if takes_words else main),
        flags_parser=lambda argv: _parse(argv, usage, takes_words),
    )


def fail(message: str) -> None:
    """Prints one line and exits with status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _quiet_without_tpu() -> None:
    """Without TPUs, libtpu (installed to compile for some) would complain that it does not know its host."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")


def _without_noise(record: logging.LogRecord) -> bool:
    """Keeps back what JAX says while it looks for devices; of one that is here and unusable the user is told."""
    text = record.getMessage()
    for name, extra in (("NVIDIA GPU", "cuda13"), ("Google TPU", "tpu")):
        if name in text and "Falling back to cpu" in text:
            mend = f"pip install -e '.[{extra}]' (or say that you want the CPU: JAX_PLATFORMS=cpu)"
            print(
                f"note: the {name} that seems to be here is not used, since JAX lacks its plugin: {mend}",
                file=sys.stderr,
            )
    if text.startswith("CUDA backend failed"):
        print(f"note: the NVIDIA GPU here is not used: {text}", file=sys.stderr)
    return record.levelno >= logging.ERROR


def _parse(argv: Sequence[str], usage: str, takes_words: bool) -> list[str]:
    name = os.path.basename(argv[0])
    if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
        print(usage.strip() + "\n")
        for flag in _own_flags():
            default = "" if flag.default in (None, "") else f" (default: {flag.default})"
            print(f"  --{flag.name}: {flag.help}{default}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, UserError) as error:
        fail(f"{error} (see {name} --help)")
    if len(rest) > 1 and not takes_words:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value (see {name} --help)")
    return rest


def _own_flags() -> list[flags.Flag]:
    return sorted(flags.FLAGS.get_flags_for_module(sys.modules["__main__"]), key=lambda flag: flag.name)


def _is_of_jaxs_devices(error: Exception) -> bool:
    """Whether JAX found none of the devices that ``JAX_PLATFORMS`` names; without a plugin it merely asserts that."""
    frames = traceback.extract_tb(error.__traceback__)
    asserted = isinstance(error, AssertionError) and os.path.basename(frames[-1].filename) == "xla_bridge.py"
    return asserted or str(error).startswith("Unable to initialize backend")


def _guard(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'output'}: disk full; free some space and run the same command again")
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if not name or name in ("ml", "pallas_kernels"):
            raise
        mend = f"pip install -e '.[{_EXTRAS[name]}]'" if name in _EXTRAS else "`make env`, then . .venv/bin/activate"
        fail(f"{name} is not installed for {sys.executable}: {mend}")
    except (RuntimeError, AssertionError) as error:
        if not _is_of_jaxs_devices(error):
            raise
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        why = str(error).partition(" (set JAX")[0] or "no such device, or JAX lacks its plugin"
        fail(f"{asked}: {why}; pip install -e '.[cuda13]' for NVIDIA, '.[tpu]' for a TPU, or set JAX_PLATFORMS=cpu")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
