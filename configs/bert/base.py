"""BERT-Base as its authors trained it: AdamW at batch 256, a million steps (Devlin et al. 2019, appendix A.2).

Command:  python scripts/train.py --config=configs/bert/base.py --workdir=runs/bert_base_128 \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]'
          python scripts/train.py --config=configs/bert/base.py:runs/bert_base_128 --workdir=runs/bert_base_512 ...
Hardware: one device of 80 GB; the authors had 16 TPU chips.
Time:     4 days there; not measured here.
Expect:   110,106,428 parameters; SQuAD 1.1 F1 of 88.5 after fine-tuning, by the paper (table 2); not measured here.
          (The paper drops attention weights too.)
"""

from ml_collections import ConfigDict

from ml.models import bert_config
from ml.train.lamb_bert import Stage, stage_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the work directory of the first stage, and means the second."""
    # One warm-up and one decay to zero span both stages.
    left = 100_000 / 990_000
    stages = Stage(256, 128, 900_000, 1e-4, 10_000, end_factor=left), Stage(256, 512, 100_000, 1e-4 * left, 0)
    config = stage_experiment(bert_config(), stages, arg)
    config.optimizer.name = "adamw"
    config.train.microbatches = 1 if not arg else 4
    return config
