"""Data sets: one file each, with a function `load(root: Path | None) -> Dataset`.

Images are kept as they are stored, whole in memory; `Split.take` hands them out as floats in [0, 1].
Normalisation is no business of the data: it is the first layer of a model (`controlat.models`), so
that eps stays in pixel units.
"""

from __future__ import annotations

from pathlib import Path

from controlat import registry
from controlat.data._types import Dataset, Split

__all__ = ["Dataset", "Split", "load"]


def load(name: str, root: str | Path | None = None) -> Dataset:
    """Load a data set by name.

    Args:
        name: a module of this folder, or the user's own "package.module:factory"; the factory returns
            a `Dataset` and may take the keyword `root`.
        root: folder of the files, for data sets that do not come with the package.

    Returns:
        The data set.

    Raises:
        ValueError: an unknown name, missing or damaged files, a factory that returns something else or
            that has no use for the given root.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.test), data.in_shape, data.num_classes
        (1297, 500, (1, 8, 8), 10)
    """
    folder = None if root is None else Path(root).expanduser()
    made: object
    if ":" in name:
        made = registry.call_factory(name, {"root": folder}, needed=() if folder is None else ("root",))
    else:
        made = registry.member(__name__, name).load(folder)
    if not isinstance(made, Dataset):
        raise ValueError(
            f"data set {name!r} gave a {type(made).__name__}; it must be a controlat.data.Dataset"
        )
    return made
