"""Goes on training a model that there is: a Hugging Face folder, or the work directory of another run.

Command:  python scripts/train.py --config=configs/lm/finetune.py:Qwen3-0.6B --workdir=runs/finetuned \\
              --config.data.sources='[{"kind": "jsonl", "path": "mine.jsonl"}]'
Hardware: whatever holds 16 bytes per parameter.
Time:     not measured.
Expect:   a first loss near what `scripts/evaluate.py --model=Qwen3-0.6B --text=mine.jsonl` prints.
"""

from ml_collections import ConfigDict

from ml.checkpoint.pretrained import load_model_config
from ml.errors import UserError
from ml.train.base import base


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the folder of the model."""
    if not arg:
        raise UserError("--config=configs/lm/finetune.py: name the model's folder, such as finetune.py:Qwen3-0.6B")
    model = load_model_config(arg)
    config = base(model)
    config.train.init_from = arg
    config.data.tokenizer.path = arg
    config.data.sequence_length = min(model.max_length, 2048)

    # AdamW: large batches are for pre-training; a fine-tuning corpus has too few of them.
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-5
    config.optimizer.weight_decay = 0.0
    config.schedule.kind = "cosine"
    config.schedule.warmup_fraction = 0.03

    config.train.steps = 200
    config.train.batch_size = 32
    config.train.microbatches = 8
    config.train.remat = "full"
    config.train.loss_chunk = 256
    config.eval.every = 50
    config.checkpoint.every = 50
    return config
