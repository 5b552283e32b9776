"""What a search found: table, verdict, figures and summary.md; everything comes from result.json."""

from controlat.report.search.judgement import search_table, verdict
from controlat.report.search.summary import read_search, search_summary, search_text, write_search

__all__ = ["read_search", "search_summary", "search_table", "search_text", "verdict", "write_search"]
