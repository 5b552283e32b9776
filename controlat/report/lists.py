"""What can be chosen by name, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controlat._util.texts import table

__all__ = ["methods_table", "terminals_table"]


def methods_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The training systems, as `controlat.methods.describe` tells them."""
    heads = ["method", "minimises", "controls (default)", "gradient evaluations", "source"]
    keys = ("name", "what", "controls", "cost", "source")
    cells = [[str(e[key]).rstrip(".").replace("|", "\\|") for key in keys] for e in entries]
    return table(heads, cells, words=range(len(heads)))


def terminals_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The terminal costs, as `controlat.pmp.terminal.describe` tells them."""
    heads = ["terminal", "Phi", "gradient evaluations per sample"]
    cells = [
        [str(e[key]).rstrip(".").replace("|", "\\|") for key in ("name", "what", "gradients")]
        for e in entries
    ]
    return table(heads, cells, words=range(len(heads)))
