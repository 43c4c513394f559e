"""The caches of all formats that lie in the repository open and hold the same numbers, now and later."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from fcache.cache_spec import (
    IncompatibleError,
    StreamConfig,
    canonical_json,
    digest,
    open_cache,
    open_source,
    targets_key,
    verify,
)
from fcache.cache_spec.upkeep.verify import Verified

FORMATS = {n: Path(__file__).parents[1] / f"golden/format-{n}.fcache" for n in (1, 2)}
GOLDEN = FORMATS[2]
FEATURES_KEY = "d081528eeff247a108e56cf6491b44bdb95339b86297276330921f45a1c255a5"
TARGETS_KEY = "3c061d214e80bedf7e63d654a346963c1e71385179bb988b2fae546bb7c60056"
SEMANTIC_KEY = "45f0a83598ca3734dde574359e888dfebea1bc147de59d3ded6320354c37c242"
# SHA-256 of decoded features and geometry, and of the semantic maps, of all records in order.
NUMBERS = {
    "train": (
        4,
        "b886056ae6ddc49e9a3136b17577a9c78dbbe0b94bb42df1c20857e770759563",
        "87385f8ca612a45ec2923e482be28d49974461203608dd16127343782db99f2d",
    ),
    "val": (
        3,
        "857b34d0f38e8f14a0ace0a72dc98755d2f388de1f7db7033e6a447d256298ae",
        "702a9535185b9e2e37871665df30ced5832832cebd08010299d289ddd0928eca",
    ),
}


@pytest.fixture(params=FORMATS, ids=lambda n: f"format-{n}")
def golden(request):
    return FORMATS[request.param]


def test_its_digests_are_the_ones_that_they_were(golden):
    manifest = open_cache(golden).manifest
    assert manifest.features.key == FEATURES_KEY
    assert targets_key(manifest.targets) == TARGETS_KEY
    assert manifest.target("semantic").key == SEMANTIC_KEY


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("split", NUMBERS)
def test_its_numbers_are_the_ones_that_they_were(golden, split, mode):
    config = StreamConfig(4, kinds=("semantic",), order="sequential", all_views=True)
    seen, numbers, maps = 0, hashlib.sha256(), hashlib.sha256()
    for block in open_source(open_cache(golden, mode=mode), split, config).blocks(0):
        seen += len(block)
        for x in block.pyramid(np).levels.values():
            numbers.update(np.ascontiguousarray(x).tobytes())
        numbers.update(np.asarray([v.to_view for v in block.views]).tobytes())
        maps.update(np.asarray(block.targets["semantic/map"]).tobytes())
    assert (seen, numbers.hexdigest(), maps.hexdigest()) == NUMBERS[split]


def test_it_is_complete_and_says_what_was_quarantined(golden):
    assert verify(golden, deep=True) == Verified(12, 12, 4440, ())
    reader = open_cache(golden)
    assert reader.quarantined("train") == {"train-1": "cannot identify image file"}
    assert reader.quarantined("val") == {}
    truth = [reader.read("val/32x32", "targets/semantic/truth", r).tolist() for r in (0, 1)]
    assert truth == [[], list(range(20))]
    assert reader.manifest.group("val/32x64").ids == ("val-32x64-0",)


def test_other_zarr_readers_see_the_same(golden):
    codes = zarr.open_group(golden, mode="r")["train/level-4"]
    assert codes.shape == (8, 3, 8, 8)
    reader = open_cache(golden)
    for record in (0, 2, 4, 6):
        np.testing.assert_array_equal(codes[record], reader.read("train", "level-4", record))
    for absent in (1, 3, 5, 7):
        assert (codes[absent] == -128).all()


def test_a_newer_format_is_refused_and_names_both_versions(tmp_path):
    shutil.copytree(GOLDEN, tmp_path / "c")
    node = json.loads((tmp_path / "c/zarr.json").read_text())
    node["attributes"]["fcache"] = {"format": 3, "something": "new"}
    (tmp_path / "c/zarr.json").write_text(json.dumps(node))
    with pytest.raises(IncompatibleError, match=r"format 3, this fcache reads up to 2; update fcache"):
        open_cache(tmp_path / "c")
    with pytest.raises(IncompatibleError, match="format 3"):
        verify(tmp_path / "c")


def test_canonical_json_and_its_digest_are_fixed():
    value = {"b": [1, 1.0, 1e-05, True, None], "a": 'ä\n"\\\x01', "c": {"y": -0.5, "x": 2**60}}
    expected = '{"a":"ä\\n\\"\\\\\\u0001","b":[1,1.0,1e-05,true,null],"c":{"x":1152921504606846976,"y":-0.5}}'
    assert canonical_json(value) == expected.encode()
    assert digest(value) == hashlib.sha256(expected.encode()).hexdigest()
