"""Files of settings in YAML, read as plain data: mappings, lists, texts, numbers, true, false and null.

YAML can do more, and none of it belongs into settings: anchors that multiply ("billion laughs") or refer to
themselves, tags that make objects, a key given twice. All of that is refused, with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from controlat._util.files import expanded, read_bytes

__all__ = ["parse_yaml", "read_settings"]

_BYTES = 1 << 20
_DEPTH = 20
_DIGITS = 100
_INTEGER = re.compile(r"[-+]?[0-9]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


def read_settings(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings from a YAML file of at most 1 MiB.

    Args:
        path: the file; ~ is the home folder.

    Returns:
        The values by key, and the line of each key, from 1.

    Raises:
        ValueError: it is missing, no regular file, too large, not UTF-8, not YAML, no mapping at the top, or
            has something in it that plain data has not; the message names the file and the line.
    """
    file = expanded(path)
    try:
        content = read_bytes(file, _BYTES)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    lines: dict[str, int] = {}
    value = parse_yaml(text, str(path), lines)
    if value is None:
        return {}, {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {_kind(value)}; it must hold settings, such as epochs: 3")
    return value, lines


def parse_yaml(text: str, name: str = "", lines: dict[str, int] | None = None) -> Any:
    """Plain data from a YAML text: words are read as in YAML 1.2.

    Args:
        text: the document.
        name: what it is, for errors.
        lines: gets the line of every key at the top.

    Raises:
        ValueError: it is not YAML, or has something in it that plain data has not.

    >>> parse_yaml("{eps: 8/255, lr: 1e-3, steps: [1, 2], progress: false, note: 'no'}")
    {'eps': '8/255', 'lr': 0.001, 'steps': [1, 2], 'progress': False, 'note': 'no'}
    >>> parse_yaml("epochs: 3\\nepochs: 4", "my.yaml")
    Traceback (most recent call last):
    ValueError: my.yaml, line 2: 'epochs' is given twice, first in line 1
    """
    reader = _Reader(text, name)
    try:
        return reader.document({} if lines is None else lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = reader.where(mark.line + 1 if mark else 1)
        raise ValueError(f"{where}not valid YAML ({error.problem or error.context})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{reader.where(None)}not valid YAML ({str(error).splitlines()[0]})") from None


class _Reader:
    """The events of one document, made into data."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        self.events: Iterator[Any] = yaml.parse(text, Loader=loader)

    def where(self, line: int | None) -> str:
        named = [self.name] * bool(self.name) + [f"line {line}"] * (line is not None)
        return f"{', '.join(named)}: " if named else ""

    def refuse(self, event: Any, reason: str) -> ValueError:
        return ValueError(f"{self.where(event.start_mark.line + 1)}{reason}")

    def next(self) -> Any:
        """The next event, if plain data has it."""
        event = next(self.events)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise self.refuse(event, "anchors and aliases (& and *) are not read; write the value out")
        if getattr(event, "tag", None):
            raise self.refuse(event, f"tags such as {event.tag} are not read; write a plain value")
        return event

    def document(self, lines: dict[str, int]) -> Any:
        assert isinstance(self.next(), yaml.StreamStartEvent)
        if isinstance(self.next(), yaml.StreamEndEvent):
            return None
        value = self.value(self.next(), 0, lines)
        self.next()
        if not isinstance(event := self.next(), yaml.StreamEndEvent):
            raise self.refuse(event, "a second document begins; give one")
        return value

    def value(self, event: Any, depth: int, lines: dict[str, int]) -> Any:
        """The value that begins with an event."""
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if depth == _DEPTH:
            raise self.refuse(event, f"nested more than {_DEPTH} levels deep")
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := self.next(), yaml.SequenceEndEvent):
                items.append(self.value(event, depth + 1, {}))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := self.next(), yaml.MappingEndEvent):
            key = event.value if isinstance(event, yaml.ScalarEvent) else None
            if key is None:
                raise self.refuse(event, "a key must be a word")
            if key in mapping:
                raise self.refuse(event, f"{_short(key)} is given twice, first in line {lines[key]}")
            lines[key] = event.start_mark.line + 1
            mapping[key] = self.value(self.next(), depth + 1, {})
        return mapping

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted
            return text
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
        if _INTEGER.fullmatch(text):
            if len(text) > _DIGITS:
                raise self.refuse(event, f"a number of {len(text)} digits; at most {_DIGITS} are read")
            return int(text)
        return float(text) if _REAL.fullmatch(text) and len(text) <= _DIGITS else text


def _kind(value: object) -> str:
    return {list: "list", str: "text", bool: "word", int: "number", float: "number"}[type(value)]


def _short(key: str) -> str:
    return repr(key) if len(key) <= 60 else repr(key[:57] + "...")
