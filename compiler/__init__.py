"""skive: an ahead-of-time compiler that makes neural networks small and fast enough for the edge."""

from __future__ import annotations

__version__ = "0.1.0"
