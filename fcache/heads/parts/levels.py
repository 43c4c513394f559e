"""The levels that heads read: one of them, or all maps in order."""

from collections.abc import Sequence

from fcache.cache_spec import LevelSpec, SpecError, unknown_name
from fcache.heads.head import HeadInput


def find_level(available: Sequence[LevelSpec], wanted: str) -> str:
    """The name of the level that an option `level` means: a name ("block-5") or a stride ("16" is "level-16").

    An empty one means the last of the source, which is the coarsest or the deepest. Raises SpecError if there is none.
    """
    names = [level.name for level in available]
    name = f"level-{wanted}" if wanted.isdecimal() else wanted or names[-1]
    if name not in names:
        raise unknown_name("level", wanted, names)
    return name


def fine_to_coarse(inputs: HeadInput) -> list[LevelSpec]:
    """The levels of a head's input by increasing stride; levels of one stride keep their order.

    Raises SpecError if a level is no map (C H W).
    """
    for level in inputs.levels:
        if level.dims != "C H W":
            raise SpecError(f"this head reads maps (C H W), level {level.name!r} has the axes {level.dims!r}")
    return sorted(inputs.levels, key=lambda level: level.stride)
