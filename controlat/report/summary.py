"""A result file, and what is printed and written of it: everything is put together from the sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlat._util.files import write_text
from controlat._util.texts import table
from controlat.records import Result as ResultFile
from controlat.records import read_record
from controlat.report import sections
from controlat.report.sections import Figure, Result

__all__ = ["figures", "notes", "read", "rows", "summary", "write"]


def read(path: Path) -> dict[str, Any]:
    """A result file, checked: every field that is used, and that its parts fit together.

    Raises:
        ValueError: it is damaged; the message names file and field.
    """
    result: dict[str, Any] = read_record(path, ResultFile)
    try:
        summary(result)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: its parts do not fit together ({type(error).__name__}: {error})") from None
    return result


def rows(result: Result) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of schedules: the columns of every section.

    Raises:
        ValueError: a section has a column with another number of cells than there are schedules.
    """
    columns = {"schedule": [entry["text"] for entry in result["schedules"]]}
    for section in sections.chosen(result):
        columns |= {head: list(cells) for head, cells in section.numbers(result).items()}
    for head, cells in columns.items():
        if len(cells) != len(result["schedules"]):
            raise ValueError(
                f"column {head!r} has {len(cells)} cells for {len(result['schedules'])} schedules; the "
                "numbers of a section need one for each"
            )
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def notes(result: Result) -> list[str]:
    """What the numbers of the table mean, in lines."""
    return [line for section in sections.chosen(result) for line in section.notes(result)]


def figures(result: Result) -> dict[str, Figure]:
    """The figures of a result, by file name."""
    every: dict[str, Figure] = {}
    for section in sections.chosen(result):
        every |= section.figures(result)
    return every


def summary(result: Result) -> str:
    """summary.md: the table, what it means, the text of every section, figures, the machine."""
    env = result["environment"]
    machine = (
        f"{env['hardware']}, {env['threads']} threads, torch {env['torch']}, controlat {env['controlat']}"
    )
    parts = [
        "# Evaluation of schedules",
        table(*rows(result)),
        "\n".join(f"- {line}" for line in notes(result)),
        *filter(None, (section.text(result) for section in sections.chosen(result))),
        "\n".join(f"![{figure.title}]({name})" for name, figure in figures(result).items()),
        f"Made on {machine}.",
    ]
    return "\n\n".join(parts) + "\n"


def write(result: Result, out: Path, *, again: bool = False) -> None:
    """Write summary.md and the figures beside result.json, where they are missing or are wanted again."""
    if again or not (out / "summary.md").exists():
        write_text(out / "summary.md", summary(result))
    for name, figure in figures(result).items():
        if again or not (out / name).exists():
            figure.draw(result, out / name)
