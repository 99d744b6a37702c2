"""A small name → class table with helpful errors, used for page methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import unknown

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing ("method") and what they stand for."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that files a class under `name`; a second class under one name is a programming error."""

        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise RuntimeError(f"{self._kind} {name!r} is registered twice")
            self._entries[name] = cls
            return cls

        return add

    def get(self, name: str) -> type[T]:
        """Return the class filed under `name`; raises `UserError` with the closest name otherwise."""
        if name not in self._entries:
            raise unknown(self._kind, name, self._entries)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
