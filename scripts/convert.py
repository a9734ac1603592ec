"""Converts models between Hugging Face folders and work directories."""

import os
import sys
from pathlib import Path
from typing import Any

# Weights pass through the host only; a training job may own the accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import app
from absl import flags

from ml.checkpoint.pretrained import is_two_tower, load_model, load_two_tower, save_workdir
from ml.errors import UserError
from ml.models.huggingface import save_pretrained
from ml.models.huggingface.output_folder import check_vacant

USAGE = """Converts a Hugging Face model folder into a work directory that train.py and generate.py read, or back.

Examples:
  python scripts/convert.py --from=hf --input=Qwen3-0.6B --output=runs/qwen3
  python scripts/convert.py --from=megabatch --input=runs/qwen3 --output=export --dtype=bfloat16
"""

_FROM = flags.DEFINE_enum("from", None, ["hf", "megabatch"], "hf: from Hugging Face; megabatch: to Hugging Face.")
_INPUT = flags.DEFINE_string("input", None, "Folder to read.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to create.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16", "float16"], "Of the weights; default: as stored.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to read (megabatch); default: the newest.", lower_bound=0)


def main() -> None:
    """Reads one folder, writes the other."""
    source, target = _INPUT.value, _OUTPUT.value
    if _FROM.value is None or not source or not target:
        missing = next(flag.name for flag in (_FROM, _INPUT, _OUTPUT) if not flag.value)
        raise UserError(f"--{missing} is missing (see convert.py --help)")
    check_vacant(Path(target))  # before hours of reading
    from_workdir = _FROM.value == "megabatch"
    _check_kind(source, from_workdir)
    load: Any = load_two_tower if is_two_tower(source) else load_model
    config, params, tokenizer = load(source, step=_STEP.value, dtype=_DTYPE.value)
    if tokenizer is None:
        print(f"note: {source} has no tokenizer.json, so neither will the output", file=sys.stderr)
    if from_workdir:
        save_pretrained(target, config, params, tokenizer)
    else:
        save_workdir(target, config, params, tokenizer)
    print(target)


def _check_kind(folder: str, workdir: bool) -> None:
    """Both kinds of folder can be told apart, so a wrong --from is named instead of obeyed."""
    has_experiment = os.path.exists(os.path.join(folder, "experiment.json"))
    has_config = os.path.exists(os.path.join(folder, "config.json"))
    if workdir and not has_experiment and has_config:
        raise UserError(f"--input={folder} is a Hugging Face folder; use --from=hf")
    if not workdir and has_experiment and not has_config:
        raise UserError(f"--input={folder} is a work directory; use --from=megabatch")


if __name__ == "__main__":
    app.run(main, usage=USAGE)
