"""Files: written under a temporary name and renamed, read with an error that names them."""

from __future__ import annotations

import json
import math
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

__all__ = [
    "append_json_line",
    "expanded",
    "open_file",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "write",
    "write_json",
    "write_text",
]

JSON_LIMIT = 128 << 20  # bytes


def expanded(path: str | Path) -> Path:
    """A path whose ~ is the home folder, as a shell has it at the beginning of a word.

    Raises:
        ValueError: ~user of a user that there is not.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no home folder of that name; write ./{path} for a file") from None


def write(path: str | Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that at any moment either the old or the complete new one is there.

    Args:
        path: its final name; the folder is created.
        fill: called with the open temporary file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `write` does."""
    write(path, lambda file: file.write(text.encode()))


def open_file(path: str | Path) -> IO[bytes]:
    """Open a regular file for reading; anything else is refused at once.

    A plain `open` of a named pipe waits for a writer, a device may have no end, and a folder gives an error
    of its own.

    Args:
        path: the file; links are followed.

    Raises:
        ValueError: it is a folder, a named pipe, a socket or a device; the message names it.
        OSError: it cannot be opened (missing, no permission).

    >>> open_file("/dev/zero")
    Traceback (most recent call last):
    ValueError: /dev/zero: is a device, not a regular file; give the path of a file
    """
    _check_regular(path, os.stat(path).st_mode)  # before it is opened: a device may act on that
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    try:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # what is there now
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # no effect on regular files


def _check_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe (FIFO)", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    raise ValueError(f"{path}: is {kind}, not a regular file; give the path of a file")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Args:
        path: the file.
        limit: the most bytes that it may have.

    Raises:
        ValueError: it is larger, or no regular file; the message names it.
        OSError: it cannot be read (missing, no permission).
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path}: has {size:,} bytes, but at most {limit:,} are read here")
        return file.read(size)


def _plain(value: Any) -> Any:
    """Numbers that are not finite become the strings 'nan', 'inf', '-inf': JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value


def write_json(path: str | Path, value: object) -> None:
    """Write JSON, indented, as `write` does."""
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON, at most 128 MiB.

    Raises:
        ValueError: the file is missing, too large, no regular file or malformed; the message says where.
    """
    try:
        return json.loads(read_bytes(path, JSON_LIMIT).decode("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None


def append_json_line(path: str | Path, value: object) -> None:
    """Append one line of JSON: a crash can cut the last line short, never an earlier one.

    A last line that a crash cut short is dropped first, or the new one would be glued to it.
    """
    line = json.dumps(_plain(value), allow_nan=False) + "\n"
    with Path(path).open("ab") as file:
        complete = len(_complete(Path(path).read_bytes()))
        if complete < file.tell():
            file.truncate(complete)
        file.write(line.encode())


def _complete(text: bytes) -> bytes:
    """`text` up to its last line break."""
    return text[: text.rfind(b"\n") + 1]


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The complete lines of a JSONL file, none if it is missing; a last line cut short is left out.

    Raises:
        ValueError: a complete line is malformed; the message names the file and the line.
    """
    if not Path(path).exists():
        return []
    found = []
    for i, line in enumerate(_complete(Path(path).read_bytes()).splitlines(), start=1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {i}: not valid JSON ({error})") from None
    return found
