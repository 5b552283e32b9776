"""Data sets: one file each, with a function `load(root: Path | None, **options) -> Dataset`.

Images are kept in their stored type, in memory (`Split`) or in files (`Streamed`), and returned as floats in
[0, 1]. Normalisation is not part of the data, but the first layer of a model (`controlat.models`), so that
eps stays in pixel units. A file may define AUGMENT, the usual augmentation of its training images. Nothing
is downloaded except by `controlat data NAME`.
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
        **options: further options of the data set, such as size=64 for image folders.

    Returns:
        The data set.

    Raises:
        ValueError: an unknown name or option, missing or damaged files, a factory that returns something
            else, or does not accept the given root or options.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.test), data.in_shape, data.num_classes
        (1297, 500, (1, 8, 8), 10)
    """
    folder = None if root is None else Path(root).expanduser()
    dataset: object
    if ":" in name:
        needed = [*options, *([] if folder is None else ["root"])]
        dataset = registry.call_factory(name, {"root": folder} | options, needed=needed)
    else:
        module, variant = registry.variant(__name__, name)
        dataset = module.load(folder, **_accepted(module.load, name, variant, options))
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"data set {name!r} gave a {type(dataset).__name__}; it must be a controlat.data.Dataset"
        )
    return dataset


def _accepted(load: Any, name: str, variant: str, options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for the `load` of a data set; raises ValueError for unknown options."""
    parameters = inspect.signature(load).parameters
    if variant and "variant" not in parameters:
        raise ValueError(f"data set {name!r} is unknown: {name.partition('-')[0]} has no variants")
    allowed = [key for key in parameters if key not in ("root", "variant", "arguments")]
    if (unknown := sorted(set(options) - set(allowed))) and "arguments" not in parameters:
        takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
        raise ValueError(
            f"data set {name!r} has no option {unknown[0]!r}; {registry.meant(unknown[0], allowed)}{takes}"
        )
    return options | ({"variant": variant} if "variant" in parameters else {})


def augmentation(name: str) -> str:
    """The usual augmentation of the training images of a data set, as a text for `parse_augment`.

    >>> augmentation("cifar10"), augmentation("digits")
    ('crop-flip:pad=4', 'none')
    """
    if ":" in name:
        return "none"
    return str(getattr(registry.variant(__name__, name)[0], "AUGMENT", "none"))


def download(name: str, folder: str | Path | None = None) -> Path:
    """Download the files of a data set and check their SHA-256; files that exist are kept.

    Args:
        name: a data set with files to fetch: mnist, cifar10, cifar100, svhn.
        folder: where they go; the folder of that name in the cache by default.

    Returns:
        The folder.

    Raises:
        ValueError: a data set without files to download, another file of the same name, a server that does
            not answer (the part that was received is kept, and the next call continues it), a wrong checksum.
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
    """Header and cells of a table of all data sets: description, files in the cache, usual augmentation."""
    from controlat.data._cache import folder as home

    cells = []
    for name in registry.names(__name__):
        module = registry.member(__name__, name)
        what = (module.__doc__ or "").strip().splitlines()[0].rstrip(".")
        remotes = getattr(module, "REMOTES", ())
        if not remotes:
            files = "comes with the package" if name == "digits" else "your own (--data-dir)"
        else:
            cached = all((home(name, None) / remote.name).exists() for remote in remotes)
            size = f"{sum(remote.size for remote in remotes) / 1e6:.0f} MB"
            files = f"in {home(name, None)}" if cached else f"not in the cache ({size})"
        cells.append([name if name != "torchvision" else "torchvision-NAME", what, files, augmentation(name)])
    return ["data set", "what", "files", "usual augmentation"], cells
