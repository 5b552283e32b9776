"""Results as tables, texts and figures: everything comes from the result file."""

from controlat._util.texts import table
from controlat.report.summary import (
    assemble,
    attack_notes,
    attack_table,
    figures,
    methods_table,
    notes,
    read,
    rows,
    summary,
    write,
)

__all__ = [
    "assemble",
    "attack_notes",
    "attack_table",
    "figures",
    "methods_table",
    "notes",
    "read",
    "rows",
    "summary",
    "table",
    "write",
]
