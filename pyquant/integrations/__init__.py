"""Adapters to other libraries' interfaces. Nothing here is imported before the library itself is."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

__all__ = ["when_imported"]


class _LoaderThenCall(importlib.abc.Loader):
    def __init__(self, loader, finder):
        self._loader = loader
        self._finder = finder

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._finder.done()

    def __getattr__(self, name):
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and calls back once it has been executed.

    It stays until then: a library that only asks whether the module exists finds it, too, without importing it.
    """

    def __init__(self, name, callback):
        self._name = name
        self._callback = callback
        self._asking_others = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._name or self._asking_others:
            return None
        self._asking_others = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenCall(spec.loader, self)
        return spec

    def done(self):
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._callback()


def when_imported(name: str, callback: Callable[[], None]) -> None:
    """Calls `callback` as soon as the module `name` has been imported; at once if it has been already.

    peft and transformers take seconds to import and each is needed by some of pyquant's users only.
    """
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Finder(name, callback))
