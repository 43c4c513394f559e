"""Very many names in little memory: one text in UTF-8, cut at line ends when a name is asked for."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import overload

import numpy as np

from fcache.cache_spec.errors import CorruptError, SpecError


class Names(Sequence[str]):
    """An immutable sequence of strings without line ends; a slice is a tuple.

    A million Python strings take a hundred megabytes and a good part of a second. These take their UTF-8 bytes and
    four or eight more each, and are read when the first one is asked for.
    """

    def __init__(self, count: int, load: Callable[[], bytes]) -> None:
        self._count, self._load = count, load

    @staticmethod
    def of(names: Iterable[str]) -> "Names":
        """The names given. Raises SpecError if one holds a line end or is no valid Unicode."""
        if isinstance(names, Names):
            return names
        listed = list(names)
        text = "\n".join(listed)
        if text.count("\n") != max(0, len(listed) - 1):
            bad = next(n for n in listed if "\n" in n)
            raise SpecError(f"a name holds no line end, got {bad!r}; rename the file")
        try:
            data = text.encode()
        except UnicodeEncodeError as e:
            # What the file system gives for a name that is not UTF-8.
            raise SpecError(f"{text[max(0, e.start - 40) : e.end + 10]!r} is no valid Unicode; rename the file") from e
        return Names(len(listed), lambda: data)

    @cached_property
    def data(self) -> bytes:
        """The names in UTF-8, with a line end between two."""
        return self._load()

    def check(self) -> None:
        """Reads the names now; they are kept only if they were read before. Raises CorruptError if they are damaged."""
        _ = (self if "data" in self.__dict__ else Names(self._count, self._load))._bounds

    @cached_property
    def _bounds(self) -> np.ndarray:
        """Where the name i begins, and, less one, where the name before it ended."""
        data = np.frombuffer(self.data, dtype=np.uint8)
        small = np.uint32 if len(data) < 2**32 - 1 else np.uint64
        ends = np.flatnonzero(data == ord("\n")).astype(small)
        if self._count and len(ends) != self._count - 1:
            raise CorruptError(f"{len(ends) + 1} names found, {self._count} expected; restore the file from a copy")
        return np.concatenate([np.zeros(1, small), ends + small(1), np.asarray([len(data) + 1], dtype=small)])

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            if step == 1:
                return self._cut(start, stop)
            return tuple(self._cut(i, i + 1)[0] for i in range(start, stop, step))
        number = range(self._count)[index]
        return self._cut(number, number + 1)[0]

    def _cut(self, start: int, stop: int) -> tuple[str, ...]:
        if stop <= start:
            return ()
        first, last = int(self._bounds[start]), int(self._bounds[stop]) - 1
        return tuple(self.data[first:last].decode().split("\n"))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._count, 4096):
            yield from self._cut(start, min(start + 4096, self._count))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return len(self) == len(other) and self.data == other.data
        return isinstance(other, (tuple, list)) and tuple(self) == tuple(other)  # pyright: ignore[reportUnknownArgumentType]

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3])) + (", …" if len(self) > 3 else "")
        return f"Names({len(self)}: {shown})"
