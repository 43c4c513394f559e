"""Heads by task: one file is one task, and its `HEADS` maps names to heads. A full name is `task/head`."""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache

from fcache.cache_spec import SpecError, unknown_name
from fcache.heads.head import Head


def task_names() -> tuple[str, ...]:
    """The names of all tasks."""
    return tuple(m.name for m in pkgutil.iter_modules(__path__))


@cache
def _task(name: str) -> Mapping[str, Head]:
    found: Mapping[str, Head] = importlib.import_module(f"{__name__}.{name}").HEADS
    return found


def head_names() -> tuple[str, ...]:
    """The full names of all heads."""
    return tuple(f"{task}/{name}" for task in task_names() for name in _task(task))


def find_head(name: str) -> Head:
    """The head of a full name. Raises SpecError with the nearest names if there is none."""
    if name not in head_names():
        raise unknown_name("head", name, head_names())
    task, _, short = name.partition("/")
    return _task(task)[short]


def resolve_name(name: str, kinds: Iterable[str]) -> str:
    """The full name of a head for a source that has the target `kinds`.

    A short name means the one head of that name whose needs are among `kinds`. Raises SpecError if the name is
    unknown, if several heads would do, or if the targets that it needs are absent.
    """
    kinds = sorted(kinds)
    matching = [full for full in head_names() if name in (full, full.partition("/")[2])]
    if not matching:
        raise unknown_name("head", name, {*head_names(), *(full.partition("/")[2] for full in head_names())})
    fitting = [full for full in matching if find_head(full).needs <= set(kinds)]
    if len(fitting) > 1:
        raise SpecError(f"head {name!r} is ambiguous here, give the full name: {' or '.join(fitting)}")
    if not fitting:
        needs = " or ".join("+".join(sorted(find_head(full).needs)) for full in matching)
        raise SpecError(
            f"head {name!r} needs targets of kind {needs}, this source has {', '.join(kinds) or 'none'}; "
            "choose another head, or extract a dataset that has them"
        )
    return fitting[0]
