"""Summary and figures made again from a result file."""

from __future__ import annotations

from pathlib import Path

from controlat._util.files import read_json
from controlat.report.search import read_search, search_figures, write_search
from controlat.report.summary import figures, read, write

__all__ = ["redraw"]


def redraw(directory: str | Path) -> list[str]:
    """Make summary.md and the figures of an evaluation or a search again, from its result.json.

    Args:
        directory: where result.json is; the files are replaced there.

    Returns:
        The names of the files.

    Raises:
        ValueError: there is no result.json, it is damaged, or it is of something else.
    """
    out = Path(directory)
    path = out / "result.json"
    content = read_json(path)
    kind = content.get("format") if isinstance(content, dict) else None
    if kind == "controlat search":
        searched = read_search(path)
        write_search(searched, out)
        return ["summary.md", *search_figures(searched)]
    if kind == "controlat evaluation":
        compared = read(path)
        write(compared, out, again=True)
        return ["summary.md", *figures(compared)]
    raise ValueError(f"{path} is the result of no evaluation or search (format: {kind!r})")
