"""Results as tables, texts and figures: everything comes from the result file."""

from controlat._util.texts import table
from controlat.report.aggregate import assemble
from controlat.report.attacked import attack_figure, attack_notes, attack_table
from controlat.report.lists import controllers_table, methods_table, terminals_table
from controlat.report.redraw import redraw
from controlat.report.search import (
    read_search,
    search_figures,
    search_plan_text,
    search_summary,
    search_table,
    search_text,
    search_use,
    write_search,
)
from controlat.report.summary import figures, notes, read, rows, summary, write

__all__ = [
    "assemble",
    "attack_figure",
    "attack_notes",
    "attack_table",
    "controllers_table",
    "figures",
    "methods_table",
    "notes",
    "read",
    "read_search",
    "redraw",
    "rows",
    "search_figures",
    "search_plan_text",
    "search_summary",
    "search_table",
    "search_text",
    "search_use",
    "summary",
    "table",
    "terminals_table",
    "write",
    "write_search",
]
