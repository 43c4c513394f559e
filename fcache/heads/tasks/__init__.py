"""Heads by task: a file's `HEADS` maps names to heads, and a full name is `task/head`.

The task is the file's name, or what the file says in `TASK`, so that a large head of a task has a file of its own.
"""

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache

from fcache.cache_spec import SpecError, unknown_name
from fcache.heads.head import Head


@cache
def _plugins() -> tuple[tuple[str, Mapping[str, Head]], ...]:
    """The task and the heads of every file, by task."""
    modules = [(m.name, importlib.import_module(f"{__name__}.{m.name}")) for m in pkgutil.iter_modules(__path__)]
    found = [(str(getattr(module, "TASK", name)), module.HEADS) for name, module in modules]
    return tuple(sorted(found, key=lambda plugin: plugin[0]))


def head_names() -> tuple[str, ...]:
    """The full names of all heads."""
    return tuple(f"{task}/{name}" for task, heads in _plugins() for name in heads)


def find_head(name: str) -> Head:
    """The head of a full name. Raises SpecError with the nearest names if there is none."""
    for task, heads in _plugins():
        if name.startswith(f"{task}/") and (short := name.removeprefix(f"{task}/")) in heads:
            return heads[short]
    raise unknown_name("head", name, head_names())


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
            f"{find_head(matching[0]).absent}"
        )
    return fitting[0]
