"""BERT-Large with LAMB in 8,602 steps: batch 65,536 at length 128, then 32,768 at 512, re-warmed from zero.

Command:  python scripts/train.py --config=configs/bert/large_64k_32k_mixed.py --workdir=runs/mixed_128 \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]'
          python scripts/train.py --config=configs/bert/large_64k_32k_mixed.py:runs/mixed_128 --workdir=runs/mixed ...
Hardware: 8 devices of 80 GB; more devices: divide train.microbatches by as much. The paper had 1,024 TPU v3 cores.
Time:     76 minutes there; not measured here.
Expect:   SQuAD 1.1 F1 of 90.58 after fine-tuning, by the paper (You et al. 2020, table 1); not measured here.
"""

from ml_collections import ConfigDict

from ml.models import bert_config
from ml.train.lamb_bert import mixed_batch_stages, stage_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the work directory of the first stage, and means the second."""
    model = bert_config(num_layers=24, embed_dim=1024, num_heads=16)
    return stage_experiment(model, mixed_batch_stages(), arg)
