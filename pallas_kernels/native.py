"""Compiles a C++ source of this package for the CPU that it is to run on, once, and registers it with JAX."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
from typing import NamedTuple

import jax
from absl import logging

from pallas_kernels.platform import cache_folder, cpu_kind

LANES = 16  # floats: as many as any CPU's vector register holds, so that a head of a multiple fills those of all
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-w")
_HEADERS = pathlib.Path(__file__).parent  # that sources include those of ``cpu/`` from
_REGISTERED: set[str] = set()
_LOCK = threading.Lock()  # programs are traced in several threads


class Native(NamedTuple):
    """A function that `jax.ffi.ffi_call` can call, or why there is none.

    Attributes:
      target: the name it is registered by.
      missing: the reason, without a full stop.
    """

    target: str = ""
    missing: str | None = None


@functools.cache
def register(source: pathlib.Path, symbol: str) -> Native:
    """Makes ``symbol`` of a C++ ``source`` known to JAX's CPU backend: compiles for some seconds if it never did here.

    What was compiled is kept in ``native/`` below `pallas_kernels.platform.cache_folder`, by what it depends on: the
    source, the headers beside it and in ``cpu/``, the compiler, JAX's headers and the CPU. The compiler is ``$CXX``,
    or else ``c++``, ``g++`` or ``clang++``.
    """
    with _LOCK:
        return _register(source, symbol)


def _register(source: pathlib.Path, symbol: str) -> Native:
    compiler = _compiler()
    if compiler is None:
        return Native(missing="there is no C++ compiler here ($CXX, c++, g++, clang++)")
    headers = [path for folder in (source.parent, _HEADERS / "cpu") for path in sorted(folder.glob("*.h"))]
    texts = [path.read_bytes() for path in (source, *headers)]
    march = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    command = [*compiler, *_FLAGS, march, f"-I{_HEADERS}", f"-I{jax.ffi.include_dir()}", str(source)]
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
        depends = [
            *texts,
            version,
            " ".join([*compiler, *_FLAGS]).encode(),
            jax.lib.__version__.encode(),
            cpu_kind().encode(),
        ]
        key = hashlib.sha256(b"\0".join(depends)).hexdigest()[:16]
        library = cache_folder() / "native" / f"{source.stem}-{key}.so"
        if not library.exists():
            _compile(command, library)
        function = getattr(ctypes.CDLL(str(library)), symbol)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        first = next((line for line in said if "error" in line), "".join(said[:1]))
        return Native(missing=f"{compiler[0]} failed: {first or error}")
    except (OSError, AttributeError, subprocess.TimeoutExpired) as error:
        return Native(missing=f"compiling {source.name} failed: {error}")
    # The name holds the key: a program that was compiled for another source asks for another name.
    name = f"megabatch_{symbol}_{key}"
    if name not in _REGISTERED:  # XLA refuses a second function of a name, be it the same from another folder
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
        _REGISTERED.add(name)
    return Native(name)


def _compiler() -> list[str] | None:
    """The command, with its own arguments."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    names = [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]
    return next(([path, *arguments] for name, *arguments in names if (path := shutil.which(name))), None)


def _compile(command: list[str], library: pathlib.Path) -> None:
    logging.info("compiling %s for this CPU, once", command[-1])
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        # Whole or not there at all, however many processes do this at once.
        made = os.path.join(folder, library.name)
        subprocess.run([*command, "-o", made], capture_output=True, check=True, timeout=600)
        os.replace(made, library)
