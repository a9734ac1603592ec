"""A benchmark's JSON: whole on the disk, or as it was before."""

import json
from pathlib import Path
from typing import Any


def write(path: Path, document: dict[str, Any]) -> None:
    """Writes the whole report anew; the folder is made."""
    from ml.studies.record import write_whole

    write_whole(path, json.dumps(document, indent=1) + "\n")
