"""What can be chosen by name, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from controlat._util.texts import table

__all__ = ["controllers_table", "methods_table", "terminals_table"]


def methods_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The training systems, as `controlat.methods.describe` tells them."""
    columns = {"minimises": "what", "controls (default)": "controls", "gradient evaluations": "cost"}
    return _listed(entries, {"method": "name"} | columns | {"source": "source"})


def terminals_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The terminal costs, as `controlat.pmp.terminal.describe` tells them."""
    columns = {"terminal": "name", "Phi": "what", "gradient evaluations per sample": "gradients"}
    return _listed(entries, columns)


def controllers_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The closed loops, as `controlat.pmp.controllers.describe` tells them."""
    columns = {"controller": "name", "u_t": "what", "options (default)": "options", "source": "source"}
    return _listed(entries, columns)


def _listed(entries: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A row for each entry; what each column shows is under its head."""
    cells = [[str(e[key]).rstrip(".").replace("|", "\\|") for key in columns.values()] for e in entries]
    return table(list(columns), cells, words=range(len(columns)))
