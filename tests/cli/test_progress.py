"""Progress lines, on a terminal and elsewhere."""

import io

import pytest

from fcache.cli.progress import Progress, duration, size
from fcache.cli.tables import fields, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_off_a_terminal_a_plain_line_comes_every_ten_seconds() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock=clock) as progress:
        for clock.now in range(35):
            progress.show(f"at {clock.now}")
    assert stream.getvalue() == "at 10\nat 20\nat 30\n"


def test_on_a_terminal_one_line_is_rewritten_and_ended() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.show("a long line")
        clock.now = 1
        progress.show("short")
    assert stream.getvalue() == "\ra long line\rshort      \n"


def test_the_last_text_is_shown_when_progress_ends_on_a_terminal() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.show("1/2")
        progress.show("2/2")
    assert stream.getvalue() == "\r1/2\r2/2\n"


def test_a_note_stays_on_its_own_line() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.show("1/2")
        progress.note("bad.jpg: truncated")
    assert stream.getvalue() == "\r1/2\r   \rbad.jpg: truncated\n"


def test_what_is_printed_elsewhere_finds_a_line_of_its_own() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock=clock) as progress:
        progress.clear()
        progress.show("1/2")
        progress.clear()
        stream.write("result\n")
        clock.now = 1
        progress.show("2/2")
    assert stream.getvalue() == "\r1/2\r   \rresult\n\r2/2\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (273600, "3 d 4 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (31_457_280, "31.5 MB"), (1.24e12, "1.24 TB")]
)
def test_sizes_read_well(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_tables_align_their_columns() -> None:
    assert table(["head", "mIoU"], [["linear", "0.4"], ["upernet", "0.456"]]) == (
        "head      mIoU\nlinear     0.4\nupernet  0.456"
    )
    assert fields([("a", "1"), ("long", "2")]) == "a     1\nlong  2"
