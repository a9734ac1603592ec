"""An outcome and its record, to try things on."""

from ml.studies.outcome import Measured, Outcome, Panel, Series
from ml.studies.record import Record


def outcome(**changes):
    """A claim that holds with three seeds, but for ``changes``."""
    values = {
        "paper": "A paper (2020)",
        "have": "a method (`ml/optim/lamb.py`)",
        "claim": "Ours is lower | than theirs",
        "setup": "three numbers",
        "baseline": Measured("theirs", (2.0, 2.2, 2.4)),
        "ours": Measured("ours", (1.0, 1.1, 1.2)),
        "unit": "nats",
        "relation": "<",
        "holds": True,
        "seeds": (1, 2, 3),
        "panels": (Panel("batch", "loss", (Series("ours", (4.0, 64.0), (1.0, 1.1), (0.1, 0.1)),), x_log=True),),
        "details": {"nested": {"list": [1, 2.5]}},
    }
    return Outcome(**values | changes)


def record(study="a_study", **changes):
    """A record of it."""
    values = {"budget": "cpu", "command": "python x", "device": "a CPU", "versions": {"jax": "1"}, "seconds": 1.5}
    return Record(study=study, **values | {"outcome": outcome()} | changes)
