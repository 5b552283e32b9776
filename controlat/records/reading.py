"""Reading a file against a shape, and the epochs of a file that has a line for each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from controlat._util.files import read_json, read_json_lines

__all__ = ["checked", "missing", "read_epochs", "read_record", "short"]


def read_record(path: str | Path, shape: Any) -> Any:
    """The content of a JSON file, as it stands there, if it has this shape.

    Args:
        path: the file.
        shape: a type of this module.

    Raises:
        ValueError: it is no JSON, or of another shape; the message names the file and the field.
    """
    return checked(read_json(path), shape, str(path))


def checked(content: Any, shape: Any, where: str) -> Any:
    """Return what was read from a file, if it has this shape.

    Args:
        content: of the file.
        shape: a type of this package.
        where: what begins the error, such as the name of the file.

    Raises:
        ValueError: it has another shape; the message names the field.

    >>> checked({"command": "train"}, dict, "settings.json")
    {'command': 'train'}
    >>> checked([], dict, "settings.json")
    Traceback (most recent call last):
    ValueError: settings.json: should be an object, got []
    """
    try:
        _adapter(shape).validate_python(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{where}: {_first_mistake(error, content)}") from None
    return content


_adapter = functools.cache(TypeAdapter)


def _first_mistake(error: ValidationError, content: Any) -> str:
    """The first thing that is wrong: field, what it should be (one of the alternatives), what it is."""
    every = error.errors(include_url=False, include_context=False)
    first = every[0]
    field = _field(first["loc"], content)
    wanted = dict.fromkeys(_words(e["msg"]) for e in every if _field(e["loc"], content) == field)
    if first["type"] == "missing":
        return f"{'.'.join(map(str, first['loc'][-1:]))} is missing" + (f" in {field}" if field else "")
    if first["type"] == "value_error":
        return f"{field}: {_words(first['msg'])}" if field else _words(first["msg"])
    return f"{field} should be {' or '.join(wanted)}, got {short(first['input'])}".lstrip()


def _field(path: Sequence[Any], content: Any) -> str:
    """The names on a path that lead into the content; it has names of alternatives, too."""
    names = []
    for part in path:
        if (isinstance(content, dict) and part in content) or (
            isinstance(content, list) and isinstance(part, int)
        ):
            names.append(str(part))
            content = content[part]
    return ".".join(names)


def _words(message: str) -> str:
    """Pydantic's message, in JSON's words."""
    text = " ".join(message.removeprefix("Value error, ").removeprefix("Input should be ").split())
    text = text if len(text) <= 300 else text[:297] + "..."
    return (
        text.replace("a valid dictionary", "an object")
        .replace("a valid integer", "a whole number")
        .replace("a valid ", "a ")
        .replace("string", "text")
    )


def short(value: object) -> str:
    """A value in at most 60 characters, for errors."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def read_epochs(path: str | Path, shape: Any, epochs: int | None = None) -> list[Any]:
    """The lines of a JSONL file that has one for each epoch, in order; none where it is missing.

    Args:
        path: the file.
        shape: of a line.
        epochs: how many lines to read; what a crash left behind them is passed over. All by default.

    Raises:
        ValueError: a line is malformed or of another shape, or epochs do not rise; the message names it.
    """
    lines = read_json_lines(path)[:epochs]
    last = -1
    for i, line in enumerate(lines, start=1):
        epoch = checked(line, shape, f"{path}, line {i}")["epoch"]
        if epoch <= last:
            raise ValueError(f"{path}, line {i}: epoch {epoch} comes after epoch {last}; each comes once")
        last = epoch
    return lines


def missing(lines: Sequence[Any], epochs: int) -> list[int]:
    """The epochs that have no line, of a run of so many; fewer where the last line says that it stopped.

    >>> missing([{"epoch": 0}, {"epoch": 2}], 4)
    [1, 3]
    >>> missing([{"epoch": 0, "stopped": "enough"}], 4)
    []
    """
    known = {line["epoch"] for line in lines}
    stopped = bool(lines) and bool(lines[-1].get("stopped"))
    return [e for e in range(lines[-1]["epoch"] + 1 if stopped else epochs) if e not in known]
