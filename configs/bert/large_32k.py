"""BERT-Large with LAMB at batch 32,768: 15,625 steps, peak rate 0.005, 3,125 steps of warm-up (1/5).

Command:  python scripts/train.py --config=configs/bert/large_32k.py --workdir=runs/large_32k_128 \\
              --config.data.sources='[{"kind": "array_record", "path": "gs://.../*.array_record"}]'
          python scripts/train.py --config=configs/bert/large_32k.py:runs/large_32k_128 --workdir=runs/large_32k_512 ...
Hardware: 8 devices of 80 GB; more devices: divide train.microbatches by as much. 512 TPU v5p (v5p:8x8x8) with
          train.microbatches=1: see docs/results/preflight_bert_large_32k_v5p_8x8x8.json.
Time:     not measured.
Expect:   SQuAD 1.1 F1 of 91.475 after fine-tuning, by the paper (You et al. 2020, table 1); not measured here.
"""

from ml_collections import ConfigDict

from ml.models import bert_config
from ml.train.lamb_bert import single_batch_stages, stage_experiment


def get_config(arg: str = "") -> ConfigDict:
    """See the module's docstring; ``arg`` is the work directory of the first stage, and means the second."""
    model = bert_config(num_layers=24, embed_dim=1024, num_heads=16)
    return stage_experiment(model, single_batch_stages(32_768), arg)
