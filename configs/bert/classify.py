"""Fine-tunes a BERT to tell which package of Python's standard library a docstring is from.

Command:  python scripts/train.py --config=configs/bert/classify.py:runs/bert_tiny --workdir=runs/bert_packages
          (or another work directory of an encoder, or a Hugging Face folder such as bert-base-uncased)
Hardware: any CPU for `configs/bert/tiny_cpu.py`'s model.
Time:     2,400 steps of 32 docstrings; 16 minutes on two busy cores.
Expect:   after `configs/bert/tiny_cpu.py` 0.82 of the held-out docstrings (docs/results/cpu/bert_packages.json), where
          a bag of words has 0.80 (docs/results/cpu/bag_of_words.json, from `scripts/bag_of_words.py`).
"""

import dataclasses

from ml_collections import ConfigDict

from ml.checkpoint.pretrained import load_model_config
from ml.data import DataConfig, LabelledConfig, SourceConfig, TokenizerConfig
from ml.errors import UserError
from ml.models import EncoderConfig
from ml.train.base import base

# The packages with the most docstrings that every supported Python has.
PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "encodings", "http", "idlelib", "importlib", "json"),
    *("logging", "mailbox", "multiprocessing", "pathlib", "tarfile", "tkinter", "turtle", "typing", "unittest"),
    *("urllib", "wsgiref", "xml", "xmlrpc", "zipfile"),
)


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the folder of the pre-trained model."""
    if not arg:
        raise UserError("--config=configs/bert/classify.py: name the model's folder, as in classify.py:runs/bert_tiny")
    model = load_model_config(arg)
    if model.encoder is None:
        raise UserError(f"--config=configs/bert/classify.py:{arg}: is a decoder; give an encoder (BERT)")
    small = model.embed_dim < 512
    # The first token of a small model has learned too little to stand for the text.
    encoder = EncoderConfig(model.encoder.token_types, num_classes=len(PACKAGES), pooling="mean" if small else "first")
    data = DataConfig(
        sources=(SourceConfig(kind="python_docstrings"),),
        tokenizer=TokenizerConfig(path=arg),
        sequence_length=min(model.max_length, 128),
        heldout_fraction=0.2,
        labelled=LabelledConfig(PACKAGES, mask_fraction=0.5 if small else 0.0),
    )
    config = base(dataclasses.replace(model, encoder=encoder), data)
    config.train.init_from = arg

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3 if small else 5e-5  # the paper's, appendix A.3
    config.optimizer.weight_decay = 0.01
    config.optimizer.clip_norm = 1.0
    config.schedule.kind = "linear"
    config.schedule.warmup_fraction = 0.1

    config.train.steps = 2400 if small else 600
    config.train.batch_size = 32
    config.train.remat = "none"
    config.eval.every = config.train.steps // 6
    config.eval.batches = 1000
    config.eval.batch_size = 64
    config.checkpoint.every = config.train.steps // 6
    return config
