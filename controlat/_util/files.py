"""Files: written atomically by a temporary file and a rename; errors of reading name the file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

__all__ = [
    "append_json_line",
    "expanded",
    "left_over",
    "open_file",
    "plain",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "write",
    "write_json",
    "write_text",
]

JSON_LIMIT = 128 << 20  # bytes


def expanded(path: str | Path) -> Path:
    """A path in which a leading ~ or ~user is the home folder, as in a shell.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: there is no home folder of that name; write ./{path} for a file") from None


def write(path: str | Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: at any moment there is either the old or the complete new one.

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
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    """Flush a folder to the disk (fsync), so that new names in it survive a loss of power."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def left_over(folder: Path, name: str = "*") -> list[Path]:
    """Temporary files that processes left when they were killed in `write`: of one file name, or of all."""
    return [p for p in folder.glob(f".{name}.????????.tmp") if p.is_file() and not p.is_symlink()]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as `write` does."""
    write(path, lambda file: file.write(text.encode()))


def open_file(path: str | Path, limit: float = math.inf) -> BufferedReader:
    """Open a regular file for reading; anything else is refused without opening it.

    A plain `open` of a named pipe waits for a writer, and a device may have no end.

    Args:
        path: the file; links are followed.
        limit: the most bytes that it may have.

    Raises:
        ValueError: it is larger, or a folder, a named pipe, a socket or a device; the message names it.
        OSError: it cannot be opened (missing, no permission).

    >>> open_file("/dev/zero")
    Traceback (most recent call last):
    ValueError: /dev/zero: is a device, not a regular file; give the path of a file
    """
    _check(path, os.stat(path), limit)  # before opening, which may have an effect on a device
    file = open(path, "rb", opener=_without_waiting)  # noqa: SIM115
    try:
        _check(path, os.fstat(file.fileno()), limit)  # the file may have been replaced meanwhile
    except BaseException:
        file.close()
        raise
    return file


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # no effect on regular files


def _check(path: str | Path, status: os.stat_result, limit: float) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe (FIFO)", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise ValueError(f"{path}: is {kind}, not a regular file; give the path of a file")
    if status.st_size > limit:
        raise ValueError(f"{path}: has {status.st_size:,} bytes, but at most {limit:,} are read here")


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Args:
        path: the file.
        limit: the most bytes that it may have.

    Raises:
        ValueError: it is larger, or no regular file; the message names it.
        OSError: it cannot be read (missing, no permission).
    """
    with open_file(path, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # no more, though it may grow meanwhile


def plain(value: Any) -> Any:
    """A value for JSON, which has no such numbers: NaN and infinities become 'nan', 'inf' and '-inf'."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def write_json(path: str | Path, value: object) -> None:
    """Write JSON, indented, as `write` does."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON, at most 128 MiB, in which all numbers are finite and no key comes twice.

    Raises:
        ValueError: the file is missing, too large, no regular file or malformed; the message says where.
    """
    try:
        return _parsed(read_bytes(path, JSON_LIMIT), str(path))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None


def _parsed(text: bytes, where: str) -> Any:
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is not finite")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} comes twice")
    return content


_DECODER = json.JSONDecoder(parse_float=_number, parse_constant=_number, object_pairs_hook=_object)


def append_json_line(path: str | Path, value: object) -> None:
    """Append one line of JSON, and flush it to the disk: a crash can truncate the last line only.

    A last line that is truncated already is removed first.
    """
    line = json.dumps(plain(value), allow_nan=False) + "\n"
    path = Path(path)
    before = read_bytes(path, JSON_LIMIT) if path.exists() else None
    with path.open("ab") as file:
        if before is not None and len(complete := _complete(before)) < len(before):
            file.truncate(len(complete))
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())
    if before is None:
        _sync_folder(path.parent)


def _complete(text: bytes) -> bytes:
    """`text` up to its last line break."""
    return text[: text.rfind(b"\n") + 1]


def read_json_lines(path: str | Path) -> list[Any]:
    """The complete lines of a JSONL file, none if it is missing; a truncated last line is left out.

    Raises:
        ValueError: it is too large, no regular file, or a complete line is malformed; the message names the
            file and the line.
    """
    if not Path(path).exists():
        return []
    lines = _complete(read_bytes(path, JSON_LIMIT)).split(b"\n")[:-1]
    return [_parsed(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1)]
