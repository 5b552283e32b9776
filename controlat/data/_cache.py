"""The default folders of the files of data sets."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache", "cure", "folder"]


def cache() -> Path:
    """The folder that has one folder per data set; it is not created.

    Returns:
        The environment variable CONTROLAT_DATA, else `controlat` in XDG_CACHE_HOME, else
        `~/.cache/controlat`.

    Example:
        >>> from unittest import mock
        >>> with mock.patch.dict(os.environ, CONTROLAT_DATA="/data"):
        ...     print(cache())
        /data

    Source: XDG Base Directory Specification 0.8 (a relative XDG_CACHE_HOME does not count).
    """
    if given := os.environ.get("CONTROLAT_DATA"):
        return Path(given).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path("~/.cache").expanduser()) / "controlat"


def folder(name: str, root: Path | None) -> Path:
    """The folder of one data set.

    Args:
        name: the data set, such as "mnist".
        root: the folder the user gave, if any.

    Returns:
        `root` if it is given, else the folder `name` of `cache()`.

    Example:
        >>> print(folder("mnist", Path("here")))
        here
    """
    return cache() / name if root is None else root


def cure(name: str) -> str:
    """The cure for missing files, for error messages.

    Args:
        name: the data set.

    Returns:
        Half a sentence.

    Example:
        >>> cure("mnist")
        'give --data-dir FOLDER, or download it: controlat data mnist'
    """
    return f"give --data-dir FOLDER, or download it: controlat data {name}"
