"""Measures the held-out loss of a model: nats per token, perplexity, bits per byte."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import app
from absl import flags

from ml.data.config import DataConfig, MaskedConfig, SourceConfig, SourceKind, TokenizerConfig

_USAGE = """
Measures a model on text: nats per token, perplexity, bits per byte; of an encoder or an image classifier
also accuracy (one JSON object on stdout).

  python scripts/evaluate.py --model=runs/quickstart                      # on the run's own held-out text
  python scripts/evaluate.py --model=Qwen3-0.6B --text='books/*.txt'      # on any text, JSONL or Parquet
  python scripts/evaluate.py --model=runs/digits                          # on a run's held-out images
"""

_KINDS: dict[str, SourceKind] = {
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".array_record": "array_record",
    ".py": "python_source",
}

if __name__ == "__main__":
    flags.DEFINE_string("model", None, "work directory of a training run, or Hugging Face folder with its tokenizer")
    flags.DEFINE_integer("step", None, "checkpoint of a work directory; default: the newest")
    flags.DEFINE_string("text", None, "file, folder or glob to measure on; default: the run's held-out text")
    flags.DEFINE_string("text_field", "text", "key or column that holds the text in JSONL and Parquet")
    flags.DEFINE_integer("batch_size", 8, "sequences or images at a time", lower_bound=1)
    flags.DEFINE_integer("sequence_length", 0, "tokens in a sequence; default: the run's, or at most 2048")


def main() -> None:
    """Reads the flags, loads, measures, prints."""
    import jax
    import jax.numpy as jnp

    from ml.checkpoint.pretrained import load_model
    from ml.data import check_vocab, heldout_batches, prepare
    from ml.errors import UserError
    from ml.models import module_of
    from ml.parallel import MeshConfig, Rules
    from ml.train.config import TrainConfig
    from ml.train.evaluation import make_evaluate
    from ml.train.heldout import heldout_of_run

    args = flags.FLAGS
    if not args.model:
        raise UserError("--model is missing; name a work directory or a Hugging Face folder")
    folder = Path(args.model).expanduser()
    if kind := _kind(folder):
        if args.text:
            raise UserError(f"--text={args.text}: --model={folder} is of kind {kind!r} and reads no text; leave it out")
        loss = heldout_of_run(folder, args.step, args.batch_size)
        print(json.dumps(loss.scalars | {"images": loss.tokens}))
        return
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    config, params, tokenizer_path = load_model(folder, step=args.step)
    if tokenizer_path is None:
        raise UserError(f"--model={folder} has no tokenizer.json; put the model's own there")
    own = _own_data(folder)
    if args.text:
        kind = _KINDS.get(Path(args.text).suffix, "text")
        length = args.sequence_length or (own and own.sequence_length) or min(config.max_length, 2048)
        source = SourceConfig(kind=kind, path=args.text, text_field=args.text_field)
        masked = MaskedConfig() if config.encoder and not config.encoder.num_classes else None
        tokenizer = TokenizerConfig(path=str(tokenizer_path))
        data = DataConfig(
            (source,),
            tokenizer,
            length,
            heldout_fraction=0.0,
            masked=own.masked if own else masked,
            labelled=own.labelled if own else None,
        )
        side: Literal["train", "heldout"] = "train"
    elif own is None:
        raise UserError(f"--text is missing; --model={folder} is no training run with held-out text of its own")
    else:
        data, side = own, "heldout"
    if side == "heldout" and not data.heldout_fraction:
        raise UserError(f"--model={folder} is of a run that held nothing out; name a text with --text")
    if data.sequence_length > config.max_length:
        raise UserError(
            f"--sequence_length={data.sequence_length} is longer than the model's {config.max_length}; lower it"
        )
    with tempfile.TemporaryDirectory() as scratch:
        prepared: Any = prepare(data, folder if side == "heldout" else scratch, where="--text")
        check_vocab(prepared.tokenizer, config.vocab_size)
        rules = Rules.make(MeshConfig())
        rows = -(-args.batch_size // rules.batch_shards) * rules.batch_shards
        batches = heldout_batches(prepared, global_batch_size=rows, side=side)
        text_bytes = prepared.heldout_bytes if side == "heldout" else prepared.train_bytes
        with jax.set_mesh(rules.mesh):
            model = module_of(config, dtype=dtype, place=rules.spec)
            params = jax.device_put(params, rules.sharding())
            loss = make_evaluate(model, TrainConfig(), rules)(params, batches)
    # An encoder codes no text: it sees what stands behind a token.
    codes = {} if config.encoder else {"bits_per_byte": loss.bits_per_byte(text_bytes)}
    figures = loss.scalars | {"perplexity": math.exp(min(loss.per_token, 700))} | codes
    print(json.dumps(figures | {"tokens": loss.tokens, "bytes": text_bytes}))


def _kind(folder: Path) -> str | None:
    """Of the model of the run that ``folder`` is, if it is no transformer."""
    experiment = folder / "experiment.json"
    try:
        return json.loads(experiment.read_text())["model"].get("kind")
    except (OSError, ValueError, LookupError, AttributeError):
        return None  # said where the model is loaded


def _own_data(folder: Path):
    """The data of the run that ``folder`` is, or ``None``."""
    from ml.config import build

    experiment = folder / "experiment.json"
    if not experiment.is_file():
        return None
    data = json.loads(experiment.read_text()).get("data")
    return data and build(DataConfig, data, f"{experiment}: data")


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
