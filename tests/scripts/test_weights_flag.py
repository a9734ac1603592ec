"""--weights of scripts/generate.py and scripts/serve.py: how weights are kept, and what is computed with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from script_processes import error_of, run

from ml.checkpoint.pretrained import save_workdir
from ml.data.tokenizer import Tokenizer
from ml.models import Transformer, TransformerConfig, init_params
from ml.models.huggingface import save_pretrained
from ml.models.quantization import quantize_params
from ml.serve import Engine, EngineConfig, SamplingParams

CONFIG = TransformerConfig(
    vocab_size=300,
    num_layers=2,
    embed_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=48,
    max_length=64,
)
# Takes the engine's place: what is tested is what the script gives it, and compiling takes long.
TELL = """
import ml.serve.engine

class Teller:
    def __init__(self, config, params, settings, **rest):
        kernel = params["layers"]["mlp"]["up"]["kernel"]
        print(type(kernel).__name__, getattr(kernel, "dtype", None), settings.dtype.__name__)
        raise SystemExit

ml.serve.engine.Engine = Teller
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    Tokenizer.train(["Fünf große Äpfel für 3 €: naïve 漢字 🎉. " * 20], 300).save(root / "tokenizer")
    save_workdir(root / "run", CONFIG, params(), root / "tokenizer" / "tokenizer.json")
    save_pretrained(root / "hf", CONFIG, params(), root / "tokenizer" / "tokenizer.json")
    return root


@functools.cache
def params():
    shapes = jax.eval_shape(functools.partial(init_params, Transformer(CONFIG)), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), shapes)


@pytest.mark.parametrize(
    ("script", "folder", "flags", "told"),
    [
        ("generate.py", "run", ["--prompt=x", "--weights=bfloat16"], ["ArrayImpl", "bfloat16", "bfloat16"]),
        ("generate.py", "run", ["--prompt=x", "--weights=int8"], ["Int8", "None", "float32"]),
        ("serve.py", "hf", ["--port=0", "--weights=int8"], ["Int8", "None", "float32"]),
    ],
)
def test_the_engine_gets_what_was_asked_for(root, script, folder, flags, told):
    assert run(script, f"--model={root / folder}", *flags, before=TELL).stdout.split() == told


@pytest.mark.parametrize(("script", "flags"), [("generate.py", ["--prompt=x"]), ("serve.py", ["--port=0"])])
def test_another_way_is_refused(root, script, flags):
    error = error_of(run(script, f"--model={root / 'run'}", *flags, "--weights=int4"))
    assert "--weights=int4" in error and "float32|bfloat16|int8" in error


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_text_is_that_of_such_weights(root, weights):
    tokenizer = Tokenizer.load(root / "tokenizer")
    kept, settings = quantize_params(CONFIG, params()), EngineConfig(max_running=1)
    if weights == "bfloat16":
        kept = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
        settings = dataclasses.replace(settings, dtype=jnp.bfloat16)
    sampling = SamplingParams(max_tokens=24, temperature=0.0)
    ((expected,),) = Engine(CONFIG, kept, settings, stop_ids=[tokenizer.eos_id]).generate(
        [tokenizer.encode("3 € für")], sampling
    )
    flags = ["--prompt=3 € für", "--temperature=0", "--max_tokens=24", f"--weights={weights}"]
    done = run("generate.py", f"--model={root / 'hf'}", *flags)
    assert done.returncode == 0, done.stderr
    # What was printed is read as text, in which every kind of line end is one.
    assert done.stdout == tokenizer.decode(expected.tokens).replace("\r", "\n") + "\n"
