"""What a search found: table, verdict, figures and summary.md; everything comes from result.json."""

from controlat.report.search.judgement import search_table, search_use, verdict
from controlat.report.search.plan import search_plan_text
from controlat.report.search.summary import (
    read_search,
    search_figures,
    search_summary,
    search_text,
    write_search,
)

__all__ = [
    "read_search",
    "search_figures",
    "search_plan_text",
    "search_summary",
    "search_table",
    "search_text",
    "search_use",
    "verdict",
    "write_search",
]
