"""Classifies images by the names of their classes alone, with a two-tower model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import app
from absl import flags

_USAGE = """
Zero-shot classification: a class is the mean of sentences with its name, an image belongs to the nearest class. Prints
one JSON object: how many images, and the shares whose class is the nearest, or among the five nearest.

  python scripts/zero_shot.py --model=runs/basic_tiny                         # the digits that the run held out
  python scripts/zero_shot.py --model=clip-vit-base-patch32 --images=val      # val/CLASS/*.jpg
  python scripts/zero_shot.py --model=clip-vit-base-patch32 --images=val --names=names.json --templates=sentences.txt
"""

if __name__ == "__main__":
    flags.DEFINE_string("model", None, "work directory of a training run, or Hugging Face folder, of a two-tower model")
    flags.DEFINE_integer("step", None, "checkpoint of a work directory; default: the newest")
    flags.DEFINE_string("images", None, "folder with a folder of images for each class; default: the run's digits")
    flags.DEFINE_string("names", None, "JSON file: folder -> name of its class; default: the folders' own names")
    flags.DEFINE_string("templates", None, "file with a sentence a line, {} for the name; default: some of our own")
    flags.DEFINE_integer("batch_size", 64, "images at a time", lower_bound=1)


def main() -> None:
    """Reads the flags, loads, classifies, prints."""
    import dataclasses
    import functools

    import jax
    import jax.numpy as jnp

    from ml.checkpoint.pretrained import load_two_tower
    from ml.data import ImageDataConfig, Tokenizer, check_vocab, heldout_batches, prepare
    from ml.data.image_text.captions import encode_captions
    from ml.data.image_text.sources import DIGIT_NAMES, DIGIT_TEMPLATES
    from ml.errors import UserError
    from ml.models import TwoTower
    from ml.train.zero_shot import TEMPLATES, class_embeddings, zero_shot

    args = flags.FLAGS
    if not args.model:
        raise UserError("--model is missing; name a work directory or a Hugging Face folder")
    folder = Path(args.model).expanduser()
    config, params, tokenizer_path = load_two_tower(folder, step=args.step, dtype="float32")
    if tokenizer_path is None:
        raise UserError(f"--model={folder} has no tokenizer.json; put the model's own there")
    tokenizer = Tokenizer.load(tokenizer_path, "--model")
    check_vocab(tokenizer, config.text.vocab_size)
    image = config.image
    data = ImageDataConfig(
        source="folder" if args.images else "digits",
        path=args.images or "",
        heldout_fraction=0.0 if args.images else _heldout_fraction(folder),
        image_size=image.image_size,
        channels=image.channels,  # type: ignore[arg-type]
    )
    prepared = prepare(data, folder, where="--images")
    names: Sequence[str] = prepared.classes if args.images else DIGIT_NAMES  # type: ignore[attr-defined]
    templates: Sequence[str] = TEMPLATES if args.images else DIGIT_TEMPLATES
    if args.names:
        names = _named(Path(args.names), names)
    if args.templates:
        templates = _sentences(Path(args.templates))
    encode = functools.partial(encode_captions, tokenizer, length=config.text.max_length)
    side: Literal["train", "heldout"] = "train" if args.images else "heldout"
    batches = heldout_batches(prepared, global_batch_size=args.batch_size, side=side)
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = TwoTower(config, dtype=dtype)
    found = zero_shot(model, params, class_embeddings(model, params, encode, names, templates), batches)
    print(json.dumps(dataclasses.asdict(found) | {"classes": len(names), "templates": len(templates)}))


def _heldout_fraction(folder: Path) -> float:
    """Of a run on digits, the share that it has not seen."""
    from ml.errors import UserError

    experiment = folder / "experiment.json"
    data = json.loads(experiment.read_text()).get("data", {}) if experiment.is_file() else {}
    if data.get("format") != "digits" or not data.get("heldout_fraction"):
        raise UserError(f"--images is missing; --model={folder} is no run on digits that held some out")
    return float(data["heldout_fraction"])


def _named(path: Path, folders: Sequence[str]) -> list[str]:
    from ml.errors import UserError

    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        return [str(names[folder]) for folder in folders]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--names={path}: cannot be read as a JSON object ({error})") from None
    except KeyError as error:
        raise UserError(f"--names={path}: lacks a name for the class {error}") from None


def _sentences(path: Path) -> list[str]:
    from ml.errors import UserError

    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--templates={path}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.count("{}") != 1:
            raise UserError(f"--templates={path}:{number}: {line!r} must have one {{}}, where the name goes")
    if not lines:
        raise UserError(f"--templates={path}: holds no sentence")
    return lines


if __name__ == "__main__":
    app.run(main, usage=_USAGE)
