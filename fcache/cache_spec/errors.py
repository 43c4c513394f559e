"""Errors that a user can act on: each says what was expected, what was found and what to do."""

import difflib
from collections.abc import Iterable


class FcacheError(Exception):
    """Any failure that fcache reports by itself; `exit_code` is the command line's exit status."""

    exit_code = 1


class SpecError(FcacheError, ValueError):
    """A value, name or option is wrong (exit 2)."""

    exit_code = 2


class DataError(FcacheError):
    """Source data, weights or annotations cannot be used as they are (exit 1)."""


class IncompleteError(FcacheError):
    """A cache lacks shards that were asked for (exit 1)."""


class CorruptError(FcacheError):
    """A file of a cache does not hold what its commit says (exit 4)."""

    exit_code = 4


class IncompatibleError(FcacheError):
    """A cache was made with other settings, weights or data, or by a newer fcache (exit 5)."""

    exit_code = 5


class NoSpaceError(FcacheError):
    """The disk or the quota is full, or would be (exit 6)."""

    exit_code = 6


def unknown_name(what: str, name: str, known: Iterable[str]) -> SpecError:
    """A SpecError for an unknown `name` of a `what`, with the nearest known names."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known[:20])}"
    return SpecError(f"unknown {what} {name!r}; {hint}")
