"""Compiled programs are kept where the user's caches are, apart for each kind of machine."""

import json
import os
import subprocess
import sys

import pytest
from script_processes import ROOT

_PROGRAM = """
import json, sys
sys.path.insert(0, "scripts")
import compiled, jax
from pallas_kernels.platform import cpu_kind
compiled.keep_compiled_programs()
print(json.dumps([jax.config.jax_compilation_cache_dir, cpu_kind()]))
"""


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"HOME": "/h"}, "/h/.cache/megabatch/xla/{machine}"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, "/c/megabatch/xla/{machine}"),
        ({"HOME": "/h", "JAX_COMPILATION_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_where_programs_are_kept(changes, place):
    gone = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    environment = {key: value for key, value in os.environ.items() if key not in gone} | changes
    command = [sys.executable, "-c", _PROGRAM]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    folder, machine = json.loads(run.stdout)
    assert folder == place.format(machine=machine)
