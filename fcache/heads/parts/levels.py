"""The one level that a head of one level reads."""

from collections.abc import Sequence

from fcache.cache_spec import LevelSpec, unknown_name


def find_level(available: Sequence[LevelSpec], wanted: str) -> str:
    """The name of the level that an option `level` means: a name ("block-5") or a stride ("16" is "level-16").

    An empty one means the last of the source, which is the coarsest or the deepest. Raises SpecError if there is none.
    """
    names = [level.name for level in available]
    name = f"level-{wanted}" if wanted.isdecimal() else wanted or names[-1]
    if name not in names:
        raise unknown_name("level", wanted, names)
    return name
