"""rot: what holds for any features and any fitted tables, and how its codes lie in bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs.zstd import Zstd

from fcache.cache_spec import DataError, LevelSpec, SpecError, find_encoding
from fcache.cache_spec.codepacking import LARGEST_CODE, pack_codes, unpack_codes
from fcache.cache_spec.encodings import rot

LEVELS = (
    LevelSpec("pooled", "C", (6,), 32),
    LevelSpec("taps", "T C", (2, 5), 16),
    LevelSpec("map", "C H W", (4, 11, 9), 16),
    LevelSpec("fine", "C H W", (3, 40, 33), 4),
    LevelSpec("clip", "T C H W", (2, 3, 8, 17), 8),
)
STEPS = ("0.05", "0.5", "1", "8")


def features(level: LevelSpec, batch: int, seed: int) -> np.ndarray:
    """Smooth maps of channels that are mixed, of very different size, and far from zero."""
    rng = np.random.default_rng(seed)
    axis = 1 + level.dims.split().index("C")
    wide = [n if i + 1 == axis else 1 for i, n in enumerate(level.shape)]
    mixing = rng.standard_normal((level.channels, level.channels))
    scale, mean = 10.0 ** rng.uniform(-3, 3, wide), 10.0 ** rng.uniform(-3, 2, wide)
    x = rng.standard_normal((batch, *level.shape))
    mixed = np.moveaxis(np.moveaxis(x, axis, -1) @ mixing, -1, axis)
    return (mixed * scale + mean * scale).astype(np.float32)


def fitted(level: LevelSpec, *batches: np.ndarray, step: str = "1") -> dict[str, np.ndarray]:
    fit = find_encoding(f"rot:{step}").fit
    assert fit is not None
    sums = fit.start(level)
    for x in batches:
        sums = fit.add(sums, x, level)
    return dict(fit.tables(sums, level))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_the_error_is_what_the_encoding_states(level, step):
    x, encoding = features(level, 3, 0), find_encoding(f"rot:{step}")
    tables = fitted(level, features(level, 8, 0))
    decoded = encoding.decode(encoding.encode(x, level, tables, np), level, tables, np)
    assert decoded.dtype == np.float32
    assert decoded.shape == x.shape
    bound = np.broadcast_to(encoding.error(x, level, tables, np), x.shape)
    assert (abs(decoded.astype(np.float64) - x) <= bound).all()
    # On average it is far less: at most that of a uniform step, spread over all values by two orthonormal transforms.
    axes = tuple(i for i in range(x.ndim) if i != 1 + level.dims.split().index("C"))
    mean = math.sqrt((((decoded.astype(np.float64) - x) ** 2).mean(axis=axes) / tables["scale"] ** 2).mean())
    assert mean < 0.5 * float(step) * math.sqrt(16 / level.stride)


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_torch_gives_numpys_codes_but_for_ties_and_the_same_features_from_the_same_codes(level):
    x, encoding = features(level, 3, 1), find_encoding("rot:0.5")
    tables = fitted(level, features(level, 8, 1))
    there = {name: torch.from_numpy(table.copy()) for name, table in tables.items()}
    ours = encoding.encode(x, level, tables, np)[""]
    theirs = encoding.encode(torch.from_numpy(x.copy()), level, there, torch)[""].numpy()
    assert ours.dtype == theirs.dtype == np.uint8
    assert ours.shape == theirs.shape == (3, *encoding.parts(level)[0].shape)
    count = math.prod(level.shape)
    for a, b in zip(ours, theirs, strict=True):
        apart = abs(unpack_codes(a, count, np) - unpack_codes(b, count, np))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
    decoded = encoding.decode({"": ours}, level, tables, np)
    again = encoding.decode({"": torch.from_numpy(ours.copy())}, level, there, torch).numpy()
    size = abs(decoded).max(axis=0, keepdims=True)
    assert (abs(decoded - again) <= 1e-5 * size + 1e-5 * abs(decoded).max() * 1e-3).all()


@given(data=st.data())
@settings(max_examples=60)
def test_any_codes_come_back_in_both_namespaces(data):
    largest = LARGEST_CODE
    elements = st.integers(-2, 2) | st.integers(-12, 12) | st.integers(-largest, largest)
    codes = data.draw(hnp.arrays(np.int32, st.integers(1, 70), elements=elements))
    packed = pack_codes(codes, np)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_codes(packed, len(codes), np), codes)
    there = pack_codes(torch.from_numpy(codes.copy()), torch)
    np.testing.assert_array_equal(there.numpy(), packed)
    np.testing.assert_array_equal(unpack_codes(there, len(codes), torch).numpy(), codes)


@given(record=hnp.arrays(np.uint8, 1 + 3 + 5 + 10 + 10))
@example(record=np.full(29, 255, dtype=np.uint8))
def test_damaged_bytes_decode_to_some_codes(record):
    assert unpack_codes(record, 10, np).shape == (10,)


def test_codes_lie_in_bytes_as_the_format_says():
    # Folded: 0, 1, 2, 3, 17, 18 and 65534; marks, crumbs, nibbles, low bytes, high bytes.
    codes = np.asarray([0, -1, 1, -2, -9, 9, 32767], dtype=np.int32)
    crumbs, nibbles = [0b00_01_10_11, 0b11_11_11_00], [0x0E, 0xFF, 0, 0]
    left = 65534 - 18
    expected = [1, *crumbs, *nibbles, 0, left & 255, *[0] * 5, 0, left >> 8, *[0] * 5]
    assert pack_codes(codes, np).tolist() == expected


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_record_is_coded_alone(level):
    x, encoding = features(level, 3, 2), find_encoding("rot:1")
    tables = fitted(level, x)
    whole = encoding.encode(x, level, tables, np)[""]
    for i in range(len(x)):
        np.testing.assert_array_equal(encoding.encode(x[i : i + 1], level, tables, np)[""][0], whole[i])


def test_no_code_is_clipped_a_feature_too_far_away_is_an_error():
    level, encoding = LevelSpec("a", "C H W", (2, 8, 8), 16), find_encoding("rot:0.5")
    x = features(level, 4, 3)
    tables = fitted(level, x)
    x[0, 1, 3, 3] += 3000 * tables["scale"][1]
    stored = encoding.encode(x, level, tables, np)
    error = abs(encoding.decode(stored, level, tables, np) - x.astype(np.float64))
    assert (error <= encoding.error(x, level, tables, np)).all()
    x[0, 1, 3, 3] += 1e6 * tables["scale"][1]
    with pytest.raises(DataError, match="more than 32767 steps of 0.5 deviations.*use --encoding int8"):
        encoding.encode(x, level, tables, np)


def test_a_smooth_map_takes_few_bytes_and_a_constant_channel_is_exact():
    level, encoding = LevelSpec("a", "C H W", (2, 32, 32), 16), find_encoding("rot:1")
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(32) / 5)[:, None] * np.cos(np.arange(32) / 7)
    smooth = np.stack([a * waves + b for a, b in rng.standard_normal((6, 2))])
    sizes = []
    for maps in (smooth, rng.standard_normal(smooth.shape)):
        x = np.stack([maps, np.full_like(maps, 7.25)], axis=1).astype(np.float32)
        tables = fitted(level, x)
        stored = encoding.encode(x, level, tables, np)
        np.testing.assert_array_equal(encoding.decode(stored, level, tables, np)[:, 1], x[:, 1])
        sizes.append(sum(len(Zstd(level=1).encode(np.ascontiguousarray(record))) for record in stored[""]))
    assert sizes[0] < 0.25 * sizes[1]


def test_the_transform_over_a_map_is_orthonormal_and_blocks_do_not_mix():
    for size in (1, 5, 8, 11, 40, 120):
        matrix = rot._cosines(size).astype(np.float64)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-6)
        same = np.arange(size)[:, None] // rot.BLOCK == np.arange(size)[None, :] // rot.BLOCK
        assert not matrix[~same].any()


def test_tiles_of_blocks_give_the_whole_transform():
    rng = np.random.default_rng(0)
    maps, rows, columns = rng.standard_normal((2, 3, 75, 44)), rot._cosines(75), rot._cosines(44)
    found = rot._transformed(maps, rows, columns, np)
    np.testing.assert_allclose(found, rows @ maps @ columns.T, atol=1e-6)
    np.testing.assert_allclose(rot._transformed(found, rows.T, columns.T, np), maps, atol=1e-5)


def test_codes_are_stored_by_frequency_then_channel():
    order = rot._order(1, 2, 8, 16)
    rows, columns = order // 16 % 8, order % 16 % 8
    assert sorted(order.tolist()) == list(range(256))
    # Two channels of two blocks: their constants come first, then the two slowest waves.
    assert order[:4].tolist() == [0, 8, 128, 136]
    assert (np.diff(rows + columns) >= 0).all()
    np.testing.assert_array_equal(order[rot._place(1, 2, 8, 16)], np.arange(256))


def test_tables_standardise_and_decorrelate_what_they_were_fitted_to():
    level = LevelSpec("a", "C H W", (5, 12, 12), 16)
    x = features(level, 20, 4)
    tables = fitted(level, x[:7], x[7:])
    z = (np.moveaxis(x.astype(np.float64), 1, 0).reshape(5, -1) - tables["mean"][:, None]) / tables["scale"][:, None]
    np.testing.assert_allclose(z.mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(z.std(axis=1), 1, rtol=1e-3)
    y = tables["rotation"].astype(np.float64) @ z
    covariance = y @ y.T / y.shape[1]
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-3)
    assert (np.diff(np.diag(covariance)) <= 1e-6).all()
    assert {name: t.shape for name, t in tables.items()} == find_encoding("rot:1").fit.shapes(level)
    again = fitted(level, x[:7], x[7:], step="0.5")
    for name, table in tables.items():
        assert table.dtype == np.float32
        np.testing.assert_array_equal(table, again[name])


def test_a_fit_to_one_sample_or_to_constants_gives_tables_that_hold_features():
    level, encoding = LevelSpec("a", "C", (4,), 32), find_encoding("rot:1")
    x = np.asarray([[1.0, -2.0, 0.0, 1e4]], dtype=np.float32)
    for batches in ((x,), (x, x), (0 * x,)):
        tables = fitted(level, *batches)
        assert all(np.isfinite(t).all() for t in tables.values())
        decoded = encoding.decode(encoding.encode(x * 0.5, level, tables, np), level, tables, np)
        assert (abs(decoded - x * 0.5) <= encoding.error(x * 0.5, level, tables, np)).all()


@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
def test_a_record_that_was_never_written_is_nan_and_its_neighbours_are_not(xp):
    level, encoding = LevelSpec("a", "C H W", (2, 9, 8), 16), find_encoding("rot:1")
    x = features(level, 3, 5)
    tables = fitted(level, x)
    codes = encoding.encode(x, level, tables, np)[""]
    codes[1] = encoding.parts(level)[0].fill
    given_ = {k: v if xp is np else torch.from_numpy(v.copy()) for k, v in {**tables, "": codes}.items()}
    decoded = np.asarray(encoding.decode({"": given_.pop("")}, level, given_, xp))
    assert np.isnan(decoded[1]).all()
    assert np.isfinite(decoded[[0, 2]]).all()


@pytest.mark.parametrize("text", ["1.50", "01", "1e0", " 1", "0_1", "+1", "1.", ".5"])
def test_one_encoding_has_one_name(text):
    with pytest.raises(SpecError, match="is written rot:"):
        find_encoding(f"rot:{text}")


@pytest.mark.parametrize("text", ["", "0", "-1", "0.01", "9", "nan", "inf", "x", "1:2"])
def test_a_step_outside_the_range_is_refused(text):
    with pytest.raises(SpecError, match=r"needs a step from 0.05 to 8 deviations.*try rot:0.5"):
        find_encoding(f"rot:{text}")


def test_a_parameter_is_needed_where_there_is_one_and_refused_elsewhere():
    with pytest.raises(SpecError, match="takes a parameter, as in rot:0.5, got 'rot'"):
        find_encoding("rot")
    with pytest.raises(SpecError, match="takes no parameter, got 'int8:1'"):
        find_encoding("int8:1")
    assert find_encoding("rot:0.75").name == "rot:0.75"


def test_axes_in_another_order_are_refused():
    level = LevelSpec("a", "H W C", (4, 4, 2), 16)
    with pytest.raises(SpecError, match="axes T C H W in this order, level 'a' has 'H W C'"):
        find_encoding("rot:1").encode(np.zeros((1, 4, 4, 2), np.float32), level, {}, np)
