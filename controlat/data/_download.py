"""Files from the internet: checked, resumed, and never over a file of the user's.

pooch 1.9 does not serve here: after a cut or a kill it begins again at the first byte, it replaces a file of
the user's whose checksum differs, and it takes as much as a server sends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from controlat._util.files import open_file
from controlat.data._http import Cut, Refused, bytes_from, chunks

__all__ = ["Remote", "fetch"]

TIMEOUT = 30.0  # seconds without a byte
PAUSES = (0.5, 1.0, 2.0, 3.0, 4.0)  # seconds before each new try


@dataclass(frozen=True)
class Remote:
    """A file on the internet whose content is known beforehand.

    Args:
        name: its name on disk, without folders.
        urls: where to get it, http or https, the preferred one first.
        sha256: its checksum, 64 hexadecimal digits.
        size: its length in bytes.

    Raises:
        ValueError: a name with folders, no url or one of another kind, a malformed checksum or size.

    Example:
        >>> Remote("a.bin", ("ftp://example.org/a.bin",), "0" * 64, 3)
        Traceback (most recent call last):
        ValueError: a.bin: url 'ftp://example.org/a.bin' must start with http:// or https://
    """

    name: str
    urls: tuple[str, ...]
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if self.name in ("", "..") or Path(self.name).name != self.name:
            raise ValueError(f"name must be a file name without folders, got {self.name!r}")
        if not self.urls:
            raise ValueError(f"{self.name}: give at least one url")
        for url in self.urls:
            if not url.lower().startswith(("http://", "https://")):
                raise ValueError(f"{self.name}: url {url!r} must start with http:// or https://")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(
                f"{self.name}: sha256 must be 64 hexadecimal digits in lower case, got {self.sha256!r}"
            )
        if self.size < 1:
            raise ValueError(f"{self.name}: size must be > 0 bytes, got {self.size}")


def fetch(
    remotes: Sequence[Remote],
    folder: str | Path,
    progress: bool = True,
    *,
    pause: Callable[[float], object] = time.sleep,
    timeout: float = TIMEOUT,
) -> list[Path]:
    """Download files, or keep those that are already there.

    A file grows as NAME.part and gets its name once size and SHA-256 are right. What an earlier call
    left in NAME.part is continued. Each url gets five more tries after a broken connection.

    Args:
        remotes: what to get.
        folder: where to put it; created if missing.
        progress: show a progress bar per file, on a terminal only.
        pause: waits for some seconds before another try.
        timeout: seconds without an answer after which a connection counts as broken.

    Returns:
        The paths of the files, in the order of `remotes`.

    Raises:
        ValueError: another file of that name is there (it is left alone), another process is
            downloading it, or no url gave the right content.
        OSError: the file cannot be written (disk full, no permission); the message names it.

    Example:
        >>> import tempfile
        >>> there = Remote("a", ("https://example.org/a",), hashlib.sha256(b"abc").hexdigest(), size=3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "a").write_bytes(b"abc")
        ...     [path.name for path in fetch([there], folder)]
        ['a']
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder; give the folder to download into")
    folder.mkdir(parents=True, exist_ok=True)
    missing = [remote for remote in remotes if not _kept(remote, folder / remote.name)]
    for remote in missing:
        path, part = folder / remote.name, folder / f"{remote.name}.part"
        with _claim(part) as file:
            # another process may have finished it just before our claim, or the user during the download
            if not _kept(remote, path):
                with _bar(remote, progress) as bar:
                    _fill(_Download(remote, file, part, bar, pause, timeout))
                os.fsync(file.fileno())
            if not _kept(remote, path):
                os.replace(part, path)
    return [folder / remote.name for remote in remotes]


def _bar(remote: Remote, show: bool) -> Any:
    disable = None if show else True  # None: on a terminal only
    return tqdm(total=remote.size, desc=remote.name, unit="B", unit_scale=True, disable=disable, leave=False)


def _kept(remote: Remote, path: Path) -> bool:
    """Whether the file is there already; ValueError if another one has its name."""
    if not os.path.lexists(path):
        return False
    if not path.is_file():
        fault: str | None = "no regular file"
    else:
        with open_file(path) as file:
            fault = _fault(file, remote)
    if fault:
        cure = "it stays as it is; move it away or give another folder (--data-dir)"
        raise ValueError(f"{path}: is in the way and not the expected file ({fault}); {cure}")
    return True


def _fault(file: FileIO | BufferedReader, remote: Remote) -> str | None:
    """What is wrong with the content, None if nothing."""
    if (size := _size(file)) != remote.size:
        return f"expected {remote.size} bytes, found {size}"
    file.seek(0)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return None if sha256 == remote.sha256 else f"expected SHA-256 {remote.sha256}, found {sha256}"


def _size(file: FileIO | BufferedReader) -> int:
    return os.fstat(file.fileno()).st_size


@contextlib.contextmanager
def _claim(part: Path) -> Iterator[FileIO]:
    """Open a .part that no other process writes, for reading and appending; an empty one does not stay."""
    while True:
        if part.exists() and not part.is_file():
            raise ValueError(f"{part}: is in the way and no regular file; move it away")
        with part.open("a+b", buffering=0) as file:
            _lock(file, part)
            if not _is_at(file, part):  # its owner gave it the final name while we waited for the lock
                continue
            try:
                yield file
            finally:
                if _size(file) == 0 and _is_at(file, part):
                    part.unlink()
            return


def _is_at(file: FileIO, part: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), part.stat())
    except FileNotFoundError:
        return False


def _lock(file: FileIO, part: Path) -> None:
    """Without it a second process could append to the file after the first has finished it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
    except BlockingIOError:
        cure = "wait until it is done, then give the same command again"
        raise ValueError(f"{part}: another process is downloading it; {cure}") from None
    except (ImportError, OSError):  # a system or a network folder without locks
        pass


@dataclass(frozen=True)
class _Download:
    """One file on its way: where its bytes go, and how patient we are."""

    remote: Remote
    file: FileIO
    part: Path
    bar: Any
    pause: Callable[[float], object]
    timeout: float


def _fill(work: _Download) -> None:
    """Bring the .part to its full, checked content."""
    remote, file = work.remote, work.file
    if _size(file) >= remote.size:
        if _fault(file, remote) is None:
            return
        file.truncate(0)
    faults = []
    for url in remote.urls:
        try:
            return _fill_from(url, work)
        except Refused as error:
            faults.append(f"{url}: {error}")
    size = _size(file)
    kept = f"{size} of {remote.size} bytes are kept in {work.part}" if size else "nothing is kept"
    cure = f"the same command {'goes on from there' if size else 'tries again'}"
    by_hand = f"or put the file into {work.part.parent} by other means"
    raise ValueError(f"{remote.name}: download failed ({'; '.join(faults)}); {kept}: {cure}, {by_hand}")


def _fill_from(url: str, work: _Download) -> None:
    """The same from one url, going on after a broken connection."""
    for wait in (*PAUSES, None):
        try:
            _receive(url, work)
            break
        except Cut as error:
            if wait is None:
                raise Refused(f"{error}, {len(PAUSES) + 1} times") from None
            work.pause(wait)
    if fault := _fault(work.file, work.remote):
        work.file.truncate(0)  # there is no telling which byte is wrong
        raise Refused(f"wrong content, {fault}")


def _receive(url: str, work: _Download) -> None:
    """Append what is missing, as far as one connection goes, each chunk as it comes."""
    file, size = work.file, work.remote.size
    response, start = bytes_from(url, _size(file), size, work.timeout)
    with response:
        file.truncate(start)
        work.bar.n = work.bar.initial = start
        work.bar.refresh()
        for chunk in chunks(response):
            if _size(file) + len(chunk) > size:
                file.truncate(0)
                raise Refused(f"sends more than the expected {size} bytes")
            _append(file, chunk, work.part)
            work.bar.update(len(chunk))
    if _size(file) < size:
        raise Cut("the connection was cut")


def _append(file: FileIO, chunk: bytes, part: Path) -> None:
    left = memoryview(chunk)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:  # comes without the name
        raise OSError(error.errno, error.strerror, str(part)) from error
