"""Names of primitives, couplings and procedures.

A shipped entry is found because its file lies in the registry's package, an entry of another
distribution because that names a module under the registry's entry-point group, and an entry of
a single file because :func:`load_plugin` ran it. There is no list to edit.

    @primitives.register("linear")
    class Linear: ...

    primitives.get("linear")
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points, packages_distributions, version
from pathlib import Path
from typing import Any, Generic, TypeVar

from peftref.errors import PeftRefError, SpecError, unknown_name

__all__ = ["Origin", "Registry", "couplings", "load_plugin", "loaded_plugins", "origin",
           "primitives", "procedures"]

T = TypeVar("T")
Entry = TypeVar("Entry")


class Registry(Generic[T]):
    """An open set of named classes or functions.

    Args:
        kind: what an entry is called in messages.
        package: dotted name of the package whose modules register the shipped entries.
        group: entry-point group whose modules register entries of other distributions.
    """

    def __init__(self, kind: str, *, package: str | None = None, group: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._group = group
        self._entries: dict[str, T] = {}
        self._lock = threading.RLock()
        self._discovered = False

    def register(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that adds its argument under ``name``.

        Raises:
            SpecError: another class already has the name.
        """

        def add(entry: Any) -> Any:  # noqa: ANN401 - keeps the decorated class's own type
            held = self._entries.get(name)
            if held is not None and _identity(held) != _identity(entry):
                raise SpecError(
                    f"Two {self.kind}s are named {name!r}: {_identity(held)} and "
                    f"{_identity(entry)}. Rename one of them."
                )
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return the entry of that name.

        Raises:
            SpecError: no entry has the name; the message gives the nearest one.
        """
        self._discover()
        try:
            return self._entries[name]
        except KeyError:
            raise SpecError(unknown_name(self.kind, name, self._entries)) from None

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        self._discover()
        return tuple(sorted(self._entries))

    def __contains__(self, name: object) -> bool:
        self._discover()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _discover(self) -> None:
        # Set before importing: a module that asks for another entry while it is being imported
        # must see what is there, not start again. Other threads wait at the lock.
        with self._lock:
            if self._discovered:
                return
            self._discovered = True
            try:
                self._import_package()
                self._import_entry_points()
            except BaseException:
                self._discovered = False
                raise

    def _import_package(self) -> None:
        if self._package is None:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self._package}.{module.name}")

    def _import_entry_points(self) -> None:
        if self._group is None:
            return
        for point in entry_points(group=self._group):
            try:
                point.load()
            except PeftRefError:
                raise
            except Exception as error:
                raise SpecError(
                    f"Entry point {point.name!r} ({point.value}) of group {self._group!r} cannot "
                    f"be loaded: {type(error).__name__}: {error}"
                ) from error


def _identity(entry: object) -> str:
    """Return where a class or function is defined; equal after its module is reloaded."""
    owner = entry if hasattr(entry, "__qualname__") else type(entry)
    return f"{owner.__module__}.{getattr(owner, '__qualname__', owner)}"


# The protocols of the entries are written in packages above this one, hence Any.
primitives: Registry[Any] = Registry(
    "primitive", package="peftref.primitives", group="peftref.primitives"
)
couplings: Registry[Any] = Registry(
    "coupling", package="peftref.interactions", group="peftref.couplings"
)
procedures: Registry[Any] = Registry(
    "procedure", package="peftref.procedures", group="peftref.procedures"
)

_plugins: dict[Path, str] = {}


def load_plugin(path: str | Path) -> None:
    """Run a user's Python file, which registers primitives, couplings or procedures.

    A second call with the same file does nothing.

    Raises:
        SpecError: the file is missing, is not Python, or fails while it runs.
    """
    file = Path(path).expanduser().resolve()
    if file in _plugins:
        return
    if file.suffix != ".py" or not file.is_file():
        raise SpecError(f"Plugin {str(path)!r} is not a Python file; give the path of a .py file.")
    # The name must not clash between two files called plugin.py and must be equal in a worker
    # process that loads the same file.
    digest = hashlib.sha256(str(file).encode()).hexdigest()[:8]
    name = f"peftref_plugin_{file.stem}_{digest}"
    source = importlib.util.spec_from_file_location(name, file)
    if source is None or source.loader is None:
        raise SpecError(f"Plugin {str(path)!r} cannot be read as a Python module.")
    module = importlib.util.module_from_spec(source)
    sys.modules[name] = module
    try:
        source.loader.exec_module(module)
    except PeftRefError:
        del sys.modules[name]
        raise
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SpecError(f"Plugin {str(path)!r} failed: {type(error).__name__}: {error}") from error
    _plugins[file] = name


def loaded_plugins() -> tuple[Path, ...]:
    """Return the plugin files loaded so far, in order."""
    return tuple(_plugins)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who registered an entry: a distribution with its version, or a file with its hash."""

    name: str
    version: str


def origin(entry: object) -> Origin | None:
    """Return who registered a class; None for what peftref ships."""
    owner = entry if hasattr(entry, "__qualname__") else type(entry)
    top = owner.__module__.partition(".")[0]
    if top == "peftref":
        return None
    for file, module in _plugins.items():
        if module == owner.__module__:
            return Origin(file.name, hashlib.sha256(file.read_bytes()).hexdigest()[:12])
    found = packages_distributions().get(top, ())
    return Origin(found[0], version(found[0])) if found else Origin(top, "unknown")
