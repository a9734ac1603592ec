"""Folders of runs that nobody trained, with every kind of column, for what reads them."""

import json

from ml.train.reporting import MetricsFile


def write_run(folder, steps=40, **settings):
    """A run's folder; ``settings`` are keys of its ``train`` group."""
    folder.mkdir(parents=True)
    with MetricsFile(folder / "metrics.jsonl") as file:
        for step in range(1, steps + 1):
            row = {"loss": 5 / step + 1, "gradient_norm": 1 / step, "learning_rate": 0.1 * step, "parameter_norm": 9.0}
            row |= {
                "tokens": 1000,
                "tokens_seen": 1000 * step,
                "noise_scale": 50.0 * step,
                "skipped": 0,
                "balance": 1.5,
            }
            row |= {"trust_ratio/layers/mlp/up/kernel": [0.1 * step, 2.0], "trust_ratio/embed/embedding": 3.0}
            row |= {"tokens_per_second": 500.0, "mfu": 0.25} if step > 1 else {}
            file.write(step, row | ({"eval_loss": 6 / step + 1} if step % 10 == 0 else {}))
    experiment = {
        "seed": 3,
        "train": {"steps": steps, **settings},
        "data": {"sources": [{"path": "<script>x</script>"}]},
    }
    (folder / "experiment.json").write_text(json.dumps(experiment))
    memory = {"params": 2**20, "opt_state": 2**21, "ema": 0, "temporary": 2**22, "measured_peak": None, "predicted": 7}
    summary = {"ended": "finished", "device": "1 x <b>chip</b>", "parameters": 4_200_000, "memory": memory}
    summary |= {"heldout": {"loss": 1.25, "bits_per_byte": 1.5}, "versions": {"jax": "9.9"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
