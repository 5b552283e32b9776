"""Folders as registries: a new method, network or data set is one new file, without any list of them.

`names` and `member` serve the files of the package; `import_path` and `call_factory` serve the user's
own code, named as "package.module:attribute", or handed over with its name (`Named`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, Self

__all__ = [
    "NAMED",
    "Named",
    "call_factory",
    "import_path",
    "importable",
    "meant",
    "member",
    "names",
    "variant",
]


NAMED = "object:"  # how the name of an object begins


class Named(str):
    """A name that carries the object it is the name of, and stands wherever "package.module:attribute" may.

    Compared, printed and written to files it is its text; `import_path` returns the object, without which the
    text alone is of no use.

    Args:
        text: the name, such as "object:Net-1f9a3c07".
        thing: the object.

    >>> name = Named("object:pi-1", 3.14)
    >>> name == "object:pi-1", import_path(name)
    (True, 3.14)
    """

    thing: object

    def __new__(cls, text: str, thing: object) -> Self:
        name = super().__new__(cls, text)
        name.thing = thing
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return Named, (str(self), self.thing)

    def __deepcopy__(self, memo: object) -> Self:
        return self


def importable(module: str) -> bool:
    """Whether other processes can import a module by its name, if it is one of this program's at all.

    >>> importable("math"), importable("__main__")
    (True, False)
    """
    loaded = sys.modules.get(module)
    return module != "__main__" and (loaded is None or loaded.__spec__ is not None)


def meant(name: object, choices: Iterable[str]) -> str:
    """The beginning of a cure for an unknown name: the choice that resembles it, or an empty text.

    >>> meant("amatta", ["pgd", "amata"]), meant("x", ["pgd", "amata"])
    ("did you mean 'amata'? ", '')
    """
    plain = {_plain(choice): choice for choice in choices}
    close = difflib.get_close_matches(_plain(str(name)[:100]), plain, n=1)
    return f"did you mean {plain[close[0]]!r}? " if close else ""


def _plain(name: str) -> str:
    """A name in lower case without dashes and underscores, for comparison."""
    return name.lower().replace("-", "").replace("_", "")


def names(package: str) -> tuple[str, ...]:
    """The public modules in the folder of a package, found without importing them.

    Args:
        package: dotted name of a package, such as "controlat.data".

    Returns:
        The sorted module names that do not start with an underscore.

    Raises:
        ValueError: there is no such package.

    Example:
        >>> "digits" in names("controlat.data")
        True
    """
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"there is no package {package!r}; give the dotted name of a folder of modules")
    modules = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(
        sorted(module.name for module in modules if not module.name.startswith("_") and not module.ispkg)
    )


def member(package: str, name: str) -> ModuleType:
    """Import one module of a package by its short name.

    Args:
        package: dotted name of a package, such as "controlat.data".
        name: one of `names(package)`.

    Returns:
        The imported module.

    Raises:
        ValueError: no such module; the message lists the choices.

    Example:
        >>> member("controlat.data", "digits").__name__
        'controlat.data.digits'
    """
    choices = names(package)
    if name not in choices:
        raise ValueError(
            f"{package} has no {name!r}; {meant(name, choices)}choose from: {', '.join(choices) or '(none)'}"
        )
    return importlib.import_module(f"{package}.{name}")


def variant(package: str, name: str) -> tuple[ModuleType, str]:
    """Import a module of a package by "module" or "module-variant".

    Args:
        package: dotted name of a package.
        name: a name of `names(package)`, alone or followed by a dash and the name of a variant.

    Returns:
        The imported module and the text behind the first dash, empty if there is none.

    Raises:
        ValueError: no such module; the message lists the choices.

    Example:
        >>> module, text = variant("controlat.models", "lenet-32-64")
        >>> module.__name__, text
        ('controlat.models.lenet', '32-64')
    """
    short, _, text = name.partition("-")
    return member(package, short), text


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()  # the file may have been written a moment ago
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the imported module may have removed it itself
            sys.path.remove(here)


def import_path(text: str) -> object:
    """Import the user's own object, "package.module:attribute".

    The current directory is importable too, but only while the import runs.

    Args:
        text: module and attribute, both possibly dotted, with one colon between them; or a `Named`.

    Returns:
        The attribute.

    Raises:
        ValueError: the text has another form, the module cannot be imported, or lacks the attribute.
            Any other exception of the module's own code propagates with a note.

    Example:
        >>> import_path("fractions:Fraction.from_float")(0.5)
        Fraction(1, 2)
    """
    if isinstance(text, Named):
        return text.thing
    if text.startswith(NAMED) and "-" in text:
        raise ValueError(
            f"{text!r} was an object in a Python program and is in no file; give the object from there"
        )
    name, colon, attribute = text.partition(":")
    if not colon or not all(part.isidentifier() for part in [*name.split("."), *attribute.split(".")]):
        raise ValueError(f"{text!r} must read 'package.module:attribute', such as 'my_models:build'")
    try:
        with _current_directory_importable():
            module = importlib.import_module(name)
    except ImportError as error:
        cure = f"give it without '.py', as installed or as seen from {os.getcwd()}"
        raise ValueError(
            f"cannot import module {name!r} for attribute {attribute!r}: {error}; {cure}"
        ) from error
    except Exception as error:
        error.add_note(f"while importing module {name!r} for {text!r}")
        raise
    try:
        return functools.reduce(getattr, attribute.split("."), module)
    except AttributeError as error:
        public = ", ".join(key for key in vars(module) if not key.startswith("_")) or "nothing public"
        raise ValueError(f"module {name!r} has no attribute {attribute!r}; it defines: {public}") from error


def _brief(value: object) -> str:
    """A value in a few words: a tensor by its shape."""
    shape = getattr(value, "shape", None)
    return f"of shape {tuple(shape)}" if shape is not None else repr(value)


def call_factory(text: str, offered: Mapping[str, object], needed: Collection[str] = ()) -> object:
    """Import the user's factory and call it with those of the offered keywords that it accepts.

    Args:
        text: "package.module:attribute" of something callable.
        offered: keyword arguments to pass where the signature accepts them.
        needed: those of the offered keywords that may not be dropped silently.

    Returns:
        What the factory returns. Exceptions inside it propagate with a note that names it.

    Raises:
        ValueError: not importable, not callable, asks for more than is offered, or does not accept
            a needed keyword.

    Example:
        >>> call_factory("fractions:Fraction", {"numerator": 3, "colour": "red"})
        Fraction(3, 1)
    """
    factory = import_path(text)
    if not callable(factory):
        raise ValueError(f"{text!r} is a {type(factory).__name__}; it must be a function or class to call")
    signature = inspect.signature(factory)
    kinds = {parameter.name: parameter.kind for parameter in signature.parameters.values()}
    by_keyword = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds.values()
    given = {key: value for key, value in offered.items() if takes_all or kinds.get(key) in by_keyword}
    if dropped := [key for key in needed if key not in given]:
        raise ValueError(
            f"{text!r} accepts no keyword {dropped[0]!r}; add it to {signature} or do not give it"
        )
    try:
        signature.bind(**given)
    except TypeError as error:
        raise ValueError(
            f"{text!r} cannot be called: {error}; it is offered: {', '.join(offered)}"
        ) from error
    try:
        return factory(**given)
    except Exception as error:
        shown = ", ".join(f"{name} {_brief(value)}" for name, value in given.items())
        error.add_note(f"while calling the factory {text!r} with {shown}")
        raise
