"""What a run of the evaluation has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())
