"""Helpers for PyTorch models. Importing this package imports torch."""

from __future__ import annotations

from skive.torch.exits import WithExits, add_exits, exit_point, suggest_exits, train_exits

__all__ = ["WithExits", "add_exits", "exit_point", "suggest_exits", "train_exits"]
