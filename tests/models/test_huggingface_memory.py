"""Peak host memory of import and export, measured in a process of their own on a sharded 200 MB checkpoint."""

import json
import subprocess
import sys

import pytest

_PROGRAM = """
import json, resource, sys
import jax, numpy as np
from ml.models import TransformerConfig
from ml.models.huggingface import load_config, load_params, safetensors_io, save_pretrained
from ml.models.huggingface.names import leaf_shapes

def high_water_mark():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def reset():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

action, folder = sys.argv[1:]
config = TransformerConfig(vocab_size=4000, num_layers=16, embed_dim=512, num_heads=8, num_kv_heads=4, head_dim=64,
                           mlp_dim=1536, max_length=128)
if action == "make":
    params = {}
    for path, shape in leaf_shapes(config).items():
        *scopes, leaf = path.split("/")
        inner = params
        for scope in scopes:
            inner = inner.setdefault(scope, {})
        inner[leaf] = np.full(shape, 0.5, np.float32)
    save_pretrained(folder, config, params, max_shard_size="60MB")
    sys.exit()
jax.devices()
load = lambda: jax.block_until_ready(load_params(folder + "/in", load_config(folder + "/in")))
if action == "load":
    reset(); before = high_water_mark()
    params = load()
else:
    params = load()
    reset(); before = high_water_mark()
    save_pretrained(folder + "/out", config, params, max_shard_size="60MB", dtype="bfloat16")
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"growth": high_water_mark() - before, "size": size}))
"""


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    run("make", str(folder / "in"))
    assert len(list((folder / "in").glob("*.safetensors"))) >= 4
    return str(folder)


@pytest.mark.slow
def test_import_peaks_below_one_and_a_half_checkpoints(folder):
    measured = json.loads(run("load", folder))
    assert measured["size"] > 200e6
    assert measured["growth"] > 0.9 * measured["size"], "the measure must see the parameters themselves"
    assert measured["growth"] < 1.5 * measured["size"]


@pytest.mark.slow
def test_export_needs_a_fraction_of_the_checkpoint(folder):
    measured = json.loads(run("save", folder))
    assert measured["growth"] < 0.3 * measured["size"]
