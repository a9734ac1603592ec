"""How every script starts: flags in, one call down; a user's mistake ends in one line and exit status 2."""

import errno
import glob
import logging
import os
import sys
from collections.abc import Callable, Sequence

import absl.logging
from absl import app, flags

from ml.errors import UserError


def run(main: Callable[[], None], *, usage: str) -> None:
    """Parses flags and runs ``main``.

    Args:
      main: takes nothing; reads its flags itself.
      usage: what ``--help`` prints above the flags: one sentence and an example.
    """
    _quiet_without_tpu()
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    absl.logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
    app.run(lambda argv: _guard(main), flags_parser=lambda argv: _parse(argv, usage))


def fail(message: str) -> None:
    """Prints one line and exits with status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(2)


def _quiet_without_tpu() -> None:
    """Without TPUs, libtpu (installed to compile for some) would complain that it does not know its host."""
    if not glob.glob("/dev/accel*") and not glob.glob("/dev/vfio/[0-9]*"):
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")


def _parse(argv: Sequence[str], usage: str) -> list[str]:
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
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value (see {name} --help)")
    return rest


def _own_flags() -> list[flags.Flag]:
    return sorted(flags.FLAGS.get_flags_for_module(sys.modules["__main__"]), key=lambda flag: flag.name)


def _guard(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{error.filename or 'output'}: disk full; free some space and run the same command again")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
