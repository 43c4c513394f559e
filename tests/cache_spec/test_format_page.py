"""The reader on the format page reads the same numbers as fcache; the names on the page are the code's."""

import re
from pathlib import Path

import numpy as np
import pytest
from cachebuilder import LEVELS, features, group, manifest, tables_for, write_pending

from fcache.cache_spec import LevelSpec, encoding_names, find_encoding, open_cache, open_writer
from fcache.cache_spec.layout import RESERVED
from fcache.cache_spec.targets import KINDS, target_arrays

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/reference/format.md").read_text()
GOLDEN = [REPOSITORY / f"tests/golden/format-{n}.fcache" for n in (1, 2)]


@pytest.fixture(scope="module")
def page_reader():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    imported = re.findall(r"^(?:import|from) (\w+)", code, flags=re.MULTILINE)
    assert imported == ["json", "struct", "pathlib", "numpy", "numcodecs"]
    names: dict = {}
    exec(compile(code, "format.md", "exec"), names)
    return names


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.stem)
def test_the_pages_reader_reads_the_golden_caches(page_reader, golden):
    cache = open_cache(golden)
    found = {(i, v): levels for i, v, levels in page_reader["features"](golden)}
    count = 0
    for split in cache.splits:
        for records in cache.records(split):
            for record, view, sample in zip(records.records, records.views, records.samples, strict=True):
                count += 1
                for level in records.group.levels:
                    codes = cache.read(records.group.path, level.name, record).astype(np.float32)
                    scale = cache.read(records.group.path, f"{level.name}.scale", record)
                    read = found[records.group.ids[sample], view][level.name]
                    np.testing.assert_array_equal(read, codes * scale[:, None, None])
    assert count == len(found) == 7


@pytest.mark.parametrize("encoding", encoding_names())
def test_the_pages_reader_decodes_every_encoding_and_axis(folder, page_reader, encoding):
    levels = (*LEVELS, LevelSpec("taps", "T C", (2, 6), 16), LevelSpec("clip", "T C H W", (2, 3, 2, 2), 32))
    writer = open_writer(folder / "c", manifest(group(encoding=encoding, levels=levels, views=2), kinds=()))
    write_pending(writer)
    found = list(page_reader["features"](folder / "c"))
    assert len(found) == 10
    for sample, view, read in found:
        for level in levels:
            x, coded = features(level, sample, view), find_encoding(encoding)
            tables = tables_for(level, encoding)
            parts = {k: np.asarray(v) for k, v in coded.encode(x[None], level, tables, np).items()}
            expected = coded.decode(parts, level, tables, np)[0]
            # The same arithmetic, apart from the order in which products are added.
            room = 1e-5 * (abs(x).max() + abs(expected).max()) + 1e-7
            np.testing.assert_allclose(read[level.name], expected, rtol=0, atol=room)
            assert (abs(read[level.name] - x) <= coded.error(x[None], level, tables, np)[0] * 1.001 + 1e-6).all()
            if coded.fit is None:
                np.testing.assert_array_equal(read[level.name], expected)


def test_the_pages_crc_is_castagnolis(page_reader):
    assert page_reader["crc32c"](b"123456789") == 0xE3069283


def test_the_page_names_every_encoding_target_array_and_reserved_name():
    limits = {name: 3 for kind in KINDS.values() for name in kind.limits + kind.evaluation_limits}
    arrays = {a.path for k in KINDS for a in target_arrays(k, limits=limits, canvas=(4, 4), role="evaluation")}
    for name in {*arrays, *encoding_names(), *RESERVED}:
        assert f"`{name}`" in PAGE, name
