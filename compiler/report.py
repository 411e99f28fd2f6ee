"""The compile report as one self-contained HTML page."""

from __future__ import annotations

import html
import json
from typing import Any

from skive.ir import Graph


def render(report: dict[str, Any], before: Graph, after: Graph) -> str:
    """The page for `report`; names in it are escaped."""
    return f"<!doctype html><meta charset=utf-8><title>skive</title><pre>{html.escape(json.dumps(report, indent=1))}</pre>"
