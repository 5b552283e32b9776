"""Data sets: one file each, with a function `load(root: Path | None, **options) -> Dataset`.

Images are kept as they are stored, in memory (`Split`) or in files (`Streamed`), and handed out as floats
in [0, 1]. Normalisation is no business of the data: it is the first layer of a model (`controlat.models`),
so that eps stays in pixel units. A file may say with AUGMENT how its training images are usually augmented.
Nothing is downloaded unless asked for (`controlat data NAME`).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from controlat._util import registry
from controlat.data._augment import Augment, Placement, parse_augment
from controlat.data._types import Dataset, Samples, Split

__all__ = [
    "Augment",
    "Dataset",
    "Placement",
    "Samples",
    "Split",
    "augmentation",
    "download",
    "load",
    "overview",
    "parse_augment",
]


def load(name: str, root: str | Path | None = None, **options: Any) -> Dataset:
    """Load a data set by name.

    Args:
        name: a module of this folder ("torchvision-NAME" for the sets of torchvision), or the user's own
            "package.module:factory"; the factory returns a `Dataset` and may take the keyword `root`.
        root: folder of the files, for data sets that do not come with the package.
        **options: what the data set takes beyond that, such as size=64 for image folders.

    Returns:
        The data set.

    Raises:
        ValueError: an unknown name or option, missing or damaged files, a factory that returns something
            else or that has no use for the given root or options.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.test), data.in_shape, data.num_classes
        (1297, 500, (1, 8, 8), 10)
    """
    folder = None if root is None else Path(root).expanduser()
    made: object
    if ":" in name:
        given = {"root": folder} | options
        made = registry.call_factory(name, given, needed=[*options, *([] if folder is None else ["root"])])
    else:
        module, variant = registry.variant(__name__, name)
        made = module.load(folder, **_accepted(module.load, name, variant, options))
    if not isinstance(made, Dataset):
        raise ValueError(
            f"data set {name!r} gave a {type(made).__name__}; it must be a controlat.data.Dataset"
        )
    return made


def _accepted(load: Any, name: str, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for a file's `load`."""
    known = inspect.signature(load).parameters
    if variant and "variant" not in known:
        raise ValueError(f"data set {name!r} is unknown: {name.partition('-')[0]} has no variants")
    allowed = [key for key in known if key not in ("root", "variant", "arguments")]
    if (unknown := sorted(set(options) - set(allowed))) and "arguments" not in known:
        takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
        raise ValueError(
            f"data set {name!r} has no option {unknown[0]!r}; {registry.meant(unknown[0], allowed)}{takes}"
        )
    return options | ({"variant": variant} if "variant" in known else {})


def augmentation(name: str) -> str:
    """How the training images of a data set are usually augmented, as `parse_augment` reads it.

    >>> augmentation("cifar10"), augmentation("digits")
    ('crop-flip:pad=4', 'none')
    """
    if ":" in name:
        return "none"
    return str(getattr(registry.variant(__name__, name)[0], "AUGMENT", "none"))


def download(name: str, folder: str | Path | None = None) -> Path:
    """Fetch the files of a data set, checked against their SHA-256; what is there already is kept.

    Args:
        name: a data set with files to fetch: mnist, cifar10, cifar100, svhn.
        folder: where they go; the folder of that name in the cache by default.

    Returns:
        The folder.

    Raises:
        ValueError: nothing to fetch for that name, another file of the same name, a server that does not
            answer (what has come is kept, and the next call goes on from there), a wrong checksum.
    """
    from controlat.data._cache import folder as home
    from controlat.data._download import fetch

    module, variant = registry.variant(__name__, name)
    remotes = getattr(module, "REMOTES", ())
    if not remotes or variant:
        known = ", ".join(
            n for n in registry.names(__name__) if hasattr(registry.member(__name__, n), "REMOTES")
        )
        raise ValueError(f"data set {name!r} has no files to download; choose from: {known}")
    where = home(name, None if folder is None else Path(folder).expanduser())
    fetch(remotes, where)
    return where


def overview() -> tuple[list[str], list[list[str]]]:
    """Heads and cells of a table of all data sets: what they are, whether their files are in the cache."""
    from controlat.data._cache import folder as home

    cells = []
    for name in registry.names(__name__):
        module = registry.member(__name__, name)
        what = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
        remotes = getattr(module, "REMOTES", ())
        if not remotes:
            files = "comes with the package" if name == "digits" else "your own (--data-dir)"
        else:
            there = all((home(name, None) / remote.name).exists() for remote in remotes)
            size = f"{sum(remote.size for remote in remotes) / 1e6:.0f} MB"
            files = f"in {home(name, None)}" if there else f"not in the cache ({size})"
        cells.append([name if name != "torchvision" else "torchvision-NAME", what, files, augmentation(name)])
    return ["data set", "what", "files", "usual augmentation"], cells
