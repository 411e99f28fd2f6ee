"""Measured rows as a file that says when, how and where they were measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skive import bench


def write(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Writes `rows` with date, command and machine as JSON."""
    document = {"date": time.strftime("%Y-%m-%d"), "command": sys.argv, "machine": bench.machine(), "rows": rows}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
