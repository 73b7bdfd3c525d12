"""Adapters to other libraries' interfaces. Nothing here is imported before the library itself is."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

__all__ = ["when_imported"]


class _LoaderThenCall(importlib.abc.Loader):
    def __init__(self, loader, callback):
        self._loader = loader
        self._callback = callback

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._callback()

    def __getattr__(self, name):
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls back once it has been executed."""

    def __init__(self, name, callback):
        self._name = name
        self._callback = callback

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenCall(spec.loader, self._callback)
        return spec


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Calls `callback` as soon as the module `name` has been imported; at once if it has been already.

    peft and transformers take seconds to import and each is needed by some of pyquant's users only.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Finder(name, callback))
