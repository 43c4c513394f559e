"""The reference page of heads says what the code says."""

import re
from pathlib import Path

import pytest

from fcache.heads import find_head
from fcache.heads.config import typed

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "heads.md"
SECTIONS = re.findall(r"^## (\S+)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_every_option_of_a_described_head_stands_there_with_its_default(name: str, text: str):
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*?)\|", text, re.MULTILINE))
    options = find_head(name).options
    assert set(rows) == set(options)
    for option, default in options.items():
        assert typed(option, rows[option].strip(), like=default) == default


def test_the_page_describes_the_heads_of_segmentation():
    assert {"semantic/linear", "semantic/fcn", "semantic/mask2former", "semantic/upernet"} <= {
        name for name, _ in SECTIONS
    }
