"""A head as chosen by a user: text such as `upernet:width=64,lr=1e-4`, parsed, typed and resolved for a source."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fcache.cache_spec import LevelSpec, SourceInfo, SpecError, TargetSpec, unknown_name
from fcache.heads.config import HEAD_FIELDS, TrainConfig, typed
from fcache.heads.head import Head, HeadInput
from fcache.heads.tasks import find_head, resolve_name

_SHARED = frozenset(f.name for f in dataclasses.fields(TrainConfig)) - HEAD_FIELDS


@dataclass(frozen=True)
class HeadChoice:
    """A head and its options, ready to be built.

    `name` is the full name, `label` the text that it was chosen by, `options` every option with its value, `train`
    the training settings of this head.
    """

    name: str
    label: str
    options: Mapping[str, Any]
    train: TrainConfig

    @property
    def head(self) -> Head:
        """The head."""
        return find_head(self.name)

    @property
    def folder(self) -> str:
        """The name of its run's folder: the label and the seed, in characters that every file system takes."""
        return f"{re.sub(r'[^A-Za-z0-9=._+-]+', '-', self.label).strip('-.')}-seed{self.train.seed}"

    def levels(self, available: Sequence[LevelSpec]) -> tuple[str, ...]:
        """The names of the levels that it reads."""
        return self.head.levels(available, self.options)

    def inputs(self, info: SourceInfo) -> HeadInput:
        """What it is built from: its levels with free sizes, and the targets that it needs."""
        names = self.levels(info.levels)
        levels = {level.name: level.free() for level in info.levels}
        return HeadInput(tuple(levels[name] for name in names), needed_targets(self.head, info))


def needed_targets(head: Head, info: SourceInfo) -> tuple[TargetSpec, ...]:
    """The specs of the targets that a head needs, by kind in order. Raises SpecError if the source lacks one."""
    return tuple(info.target(kind) for kind in sorted(head.needs))


def parse_head(text: str) -> tuple[str, dict[str, str]]:
    """A name and options as text of `name:option=value,option=value`; a value may hold commas ("lrs=0.1,0.01").

    Raises SpecError if the text has another form.
    """
    name, colon, rest = text.partition(":")
    options: dict[str, str] = {}
    last = ""
    for piece in rest.split(",") if colon else []:
        option, equals, value = piece.partition("=")
        if equals and option.strip():
            last = option.strip()
            options[last] = value.strip()
        elif last and piece.strip():
            options[last] += f",{piece.strip()}"
        else:
            raise SpecError(f"a head is name or name:option=value,option=value, got {text!r}")
    if not name.strip():
        raise SpecError(f"a head is name or name:option=value,option=value, got {text!r}")
    return name.strip(), options


def choose_head(text: str, info: SourceInfo, config: TrainConfig) -> HeadChoice:
    """The head that `text` names, for a source; options in the text come before those of the config's section, and so
    do settings of its training (HEAD_FIELDS).

    Raises SpecError for an unknown or ambiguous name, an unknown option, a setting that all heads share, a value of a
    wrong type, absent targets, or what the head itself refuses.
    """
    short, own = parse_head(text)
    name = resolve_name(short, [t.kind for t in info.targets])
    defaults = find_head(name).options
    train, given = config.for_head(name, own)
    for option in given:
        if option in _SHARED and option not in defaults:
            raise SpecError(
                f"{option} is the same for all heads of one training, it cannot be set for {text.strip()!r} alone; "
                f"give --set {option}={given[option]}, or trainings of their own"
            )
        if option not in defaults:
            raise unknown_name(f"option of head {name!r}:", option, {*defaults, *HEAD_FIELDS})
    options = {o: typed(f"option {o!r} of head {name!r}", given.get(o, d), like=d) for o, d in defaults.items()}
    choice = HeadChoice(name=name, label=text.strip(), options=options, train=train)
    choice.head.check(choice.inputs(info), options)
    return choice


def choose_heads(texts: Sequence[str], info: SourceInfo, config: TrainConfig) -> tuple[HeadChoice, ...]:
    """`choose_head` for each text. Raises SpecError also if two of them say the same, or would share a run's folder."""
    choices = tuple(choose_head(text, info, config) for text in texts)
    for i, choice in enumerate(choices):
        for other in choices[:i]:
            if choice.folder == other.folder:
                raise SpecError(f"head {choice.label!r} is given twice; each head of one run needs options of its own")
            if dataclasses.replace(choice, label=other.label) == other:
                raise SpecError(
                    f"heads {other.label!r} and {choice.label!r} are the same, by their values; leave one out"
                )
    return choices


def needed_levels(choices: Sequence[HeadChoice], available: Sequence[LevelSpec]) -> tuple[str, ...]:
    """The names of the levels that any of the heads reads, in the source's order."""
    read = {name for choice in choices for name in choice.levels(available)}
    return tuple(level.name for level in available if level.name in read)


def needed_kinds(choices: Sequence[HeadChoice]) -> tuple[str, ...]:
    """The kinds of target that any of the heads needs, sorted."""
    return tuple(sorted({kind for choice in choices for kind in choice.head.needs}))
