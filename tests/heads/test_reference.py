"""The reference page of heads says what the code says."""

import re
from pathlib import Path

import pytest

from fcache.heads import find_head, head_names
from fcache.heads.config import typed

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "heads.md"
# A section may be about several heads, and take the options of another one.
SECTIONS = {
    name: text
    for names, text in re.findall(
        r"^## (\S+(?:, \S+)*)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    for name in names.split(", ")
}


def described(name: str) -> dict[str, str]:
    """The options of a head on the page, and their defaults."""
    text = SECTIONS[name]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?)\|", text, re.MULTILINE))
    taken = re.search(r"Options of\s+`(\S+?)`(?: without `(\w+)`)?", text)
    others = described(taken[1]) if taken else {}
    return {k: v for k, v in others.items() if k != taken[2]} | rows if taken else rows


@pytest.mark.parametrize("name", SECTIONS)
def test_every_option_of_a_described_head_stands_there_with_its_default(name: str):
    rows, options = described(name), find_head(name).options
    assert set(rows) == set(options)
    for option, default in options.items():
        assert typed(option, rows[option].strip(), like=default) == default


def test_the_page_describes_all_heads():
    assert set(SECTIONS) == set(head_names())
