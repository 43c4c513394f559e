"""Every encoding, numpy against torch, and against the error that it states."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fcache.cache_spec import LevelSpec, SpecError, encoding_names, find_encoding

LEVELS = {
    "C": (6,),
    "T C": (2, 3),
    "C H W": (3, 2, 4),
    "T C H W": (2, 2, 2, 3),
}
TINY = float(np.float32(2.0**-149))
# Those whose codes are a rounding of each value or map by itself: both namespaces give equal bits.
EXACT = sorted({n for n in encoding_names() if find_encoding(n).fit is None} | {"int4"})
SPECIAL = (0.0, -0.0, TINY, -TINY, 2.0**-126, 2.0**-24, 2.0**-25, 65504.0, 127.5, 0.5, -1.5, 1e-30, 1.0000001)


def level_of(dims: str) -> LevelSpec:
    return LevelSpec("level-4", dims, LEVELS[dims], 4)


def values(largest: float) -> st.SearchStrategy[float]:
    bound = float(np.nextafter(np.float32(largest), np.float32(0)))
    return st.floats(-bound, bound, width=32, allow_subnormal=True) | st.sampled_from(SPECIAL)


@st.composite
def batches(draw: st.DrawFn, name: str) -> tuple[LevelSpec, np.ndarray]:
    level = level_of(draw(st.sampled_from(sorted(LEVELS))))
    shape = (draw(st.integers(1, 3)), *level.shape)
    # bf16 rounds the last numbers below the largest float32 up to infinity: `largest` says where.
    return level, draw(hnp.arrays(np.float32, shape, elements=values(find_encoding(name).largest)))


def as_bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
@settings(max_examples=150)
def test_torch_gives_the_codes_and_features_of_numpy_bit_for_bit(name, data):
    level, x = data.draw(batches(name))
    encoding = find_encoding(name)
    ours = encoding.encode(x, level, {}, np)
    theirs = encoding.encode(torch.from_numpy(x.copy()), level, {}, torch)
    assert set(ours) == set(theirs) == {p.suffix for p in encoding.parts(level)}
    for part in encoding.parts(level):
        assert ours[part.suffix].dtype == part.dtype
        assert ours[part.suffix].shape == (len(x), *part.shape)
        np.testing.assert_array_equal(as_bits(theirs[part.suffix].numpy()), as_bits(ours[part.suffix]))
    decoded = encoding.decode(ours, level, {}, np)
    assert decoded.dtype == np.float32
    assert decoded.shape == x.shape
    np.testing.assert_array_equal(as_bits(encoding.decode(theirs, level, {}, torch).numpy()), as_bits(decoded))


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
@settings(max_examples=150)
def test_the_error_is_what_the_encoding_states(name, data):
    level, x = data.draw(batches(name))
    encoding = find_encoding(name)
    decoded = encoding.decode(encoding.encode(x, level, {}, np), level, {}, np)
    wide, bound = x.astype(np.float64), np.broadcast_to(encoding.error(x.astype(np.float64), level, {}, np), x.shape)
    assert np.isfinite(decoded).all()
    assert (abs(decoded.astype(np.float64) - wide) <= bound).all()


@pytest.mark.parametrize("name", EXACT)
@given(data=st.data())
def test_a_record_is_coded_alone(name, data):
    level, x = data.draw(batches(name))
    encoding = find_encoding(name)
    whole = encoding.encode(x, level, {}, np)
    for i in range(len(x)):
        for suffix, codes in encoding.encode(x[i : i + 1], level, {}, np).items():
            np.testing.assert_array_equal(as_bits(codes[0:1]), as_bits(whole[suffix][i : i + 1]))


@given(x=hnp.arrays(np.float32, (2, 3, 2, 2), elements=st.floats(width=32)))
def test_fp32_keeps_every_bit(x):
    encoding, level = find_encoding("fp32"), LevelSpec("a", "C H W", (3, 2, 2), 4)
    decoded = encoding.decode(encoding.encode(x, level, {}, np), level, {}, np)
    np.testing.assert_array_equal(as_bits(decoded), as_bits(x))


@given(x=hnp.arrays(np.uint32, (1, 64), elements=st.integers(0, 2**32 - 1)))
@example(x=np.asarray([[0x3F808000, 0x3F818000, 0x3F807FFF, 0xBF808001] * 16], dtype=np.uint32))
def test_bf16_rounds_as_torch_does(x):
    features = x.view(np.float32)
    features = np.where(np.isfinite(features), features, np.float32(1))
    codes = find_encoding("bf16").encode(features, LevelSpec("a", "C", (64,), 4), {}, np)[""]
    expected = torch.from_numpy(features.copy()).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(codes.view(np.int16), expected)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("xp", [np, torch], ids=["numpy", "torch"])
@given(data=st.data())
@settings(max_examples=30)
def test_an_array_that_is_given_is_filled_with_what_a_new_one_would_hold(name, dtype, xp, data):
    level, x = data.draw(batches(name))
    encoding = find_encoding(name)
    # Halves of what fits into float16, so that nothing that is decoded overflows there.
    stored = {k: as_xp(v, xp) for k, v in encoding.encode(np.clip(x, -3e4, 3e4), level, {}, np).items()}
    out = as_xp(np.full(x.shape, 9, dtype), xp)
    assert encoding.decode(stored, level, {}, xp, out=out) is out
    expected = np.asarray(encoding.decode(stored, level, {}, xp)).astype(dtype)
    np.testing.assert_array_equal(as_bits(np.asarray(out)), as_bits(expected))


def as_xp(x: np.ndarray, xp):
    return x if xp is np else torch.from_numpy(x.copy())


def test_maps_of_any_size_are_decoded_some_at_a_time():
    rng = np.random.default_rng(0)
    for shape in ((1, 300, 301), (5, 100, 101), (700, 7, 7), (3, 1, 1)):
        level, x = LevelSpec("a", "C H W", shape, 4), rng.standard_normal((2, *shape)).astype(np.float32)
        for name in ("int8", "int4"):
            encoding = find_encoding(name)
            stored = encoding.encode(x, level, {}, np)
            there = {k: torch.from_numpy(v) for k, v in stored.items()}
            expected = encoding.decode(there, level, {}, torch).numpy()
            np.testing.assert_array_equal(encoding.decode(stored, level, {}, np), expected)


@pytest.mark.parametrize("name", [*EXACT, "rot:1"])
def test_features_may_lie_in_memory_in_any_order(name):
    level = LevelSpec("a", "C H W", (4, 6, 9), 4)
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 9)).astype(np.float32)
    encoding = find_encoding(name)
    fit = encoding.fit
    tables = {} if fit is None else fit.tables(fit.add(fit.start(level), x, level), level)
    turned = np.asfortranarray(x)
    stored, other = (encoding.encode(a, level, tables, np) for a in (x, turned))
    for suffix, codes in stored.items():
        np.testing.assert_array_equal(other[suffix], codes)
    expected = encoding.decode(stored, level, tables, np)
    np.testing.assert_array_equal(encoding.decode(other, level, tables, np), expected)


def test_int4_packs_two_codes_a_byte_and_never_uses_its_fill():
    level = LevelSpec("a", "C H W", (1, 1, 9), 4)
    x = np.asarray([[[[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -7.0, 6.5, -7.0]]]], dtype=np.float32)
    stored = find_encoding("int4").encode(x, level, {}, np)
    assert stored[".scale"].tolist() == [[1.0]]
    codes = [7, 0, 2, 2, 0, -2, -7, 6, -7, 0]
    assert stored[""].tolist() == [[[(a + 8) | (b + 8) << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)]]]
    assert find_encoding("int4").decode(stored, level, {}, np)[0, 0, 0].tolist() == codes[:9]


def test_only_codes_that_are_made_for_it_ask_for_compression():
    level = level_of("C H W")
    asks = {n: [p.compression for p in find_encoding(n).parts(level)] for n in (*EXACT, "rot:1")}
    for name, found in asks.items():
        assert found[0] == ("zstd" if name in ("int4", "rot:1") else None), name
        assert not any(found[1:])


def test_int8_rounds_halves_to_even_and_never_uses_its_fill():
    level = LevelSpec("a", "C H W", (1, 1, 8), 4)
    x = np.asarray([[[[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5]]]], dtype=np.float32)
    codes = find_encoding("int8").encode(x, level, {}, np)
    assert codes[".scale"].tolist() == [[1.0]]
    assert codes[""].tolist() == [[[[127, 0, 2, 2, 0, -2, -127, 126]]]]


@pytest.mark.parametrize("largest", [0.0, TINY, 100 * TINY, 2.0**-126, 1e-38, 1e-30, 1.0, 3.4e38])
def test_int8_holds_maps_of_any_size(largest):
    level = LevelSpec("a", "C H W", (1, 2, 2), 4)
    x = np.asarray([[[[largest, -largest], [largest / 2, 0.0]]]], dtype=np.float32)
    stored = find_encoding("int8").encode(x, level, {}, np)
    assert stored[""].min() >= -127
    decoded = find_encoding("int8").decode(stored, level, {}, np)
    assert np.isfinite(decoded).all()
    assert abs(decoded.astype(np.float64) - x).max() <= float(x.max()) / 127 * 0.5001 + 2.0**-126


@pytest.mark.parametrize(("dims", "shape"), [("C H W", (3,)), ("T C H W", (2, 2)), ("C", ()), ("T C", (2,))])
def test_int8_has_one_scale_a_map(dims, shape):
    assert [p.shape for p in find_encoding("int8").parts(level_of(dims))] == [LEVELS[dims], shape]


@pytest.mark.parametrize("name", EXACT)
def test_what_was_never_written_decodes_to_nan_or_is_no_code(name):
    level = level_of("C H W")
    encoding = find_encoding(name)
    filled = {p.suffix: np.full((1, *p.shape), p.fill, dtype=p.dtype) for p in encoding.parts(level)}
    assert np.isnan(encoding.decode(filled, level, {}, np)).all()


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_the_largest_magnitude_fits_and_the_next_one_would_not(name, largest):
    encoding, level = find_encoding(name), LevelSpec("a", "C", (2,), 4)
    assert encoding.largest == largest

    def decoded(value: float) -> np.ndarray:
        x = np.asarray([[value, -value]], dtype=np.float32)
        with np.errstate(over="ignore"):
            return encoding.decode(encoding.encode(x, level, {}, np), level, {}, np)

    assert decoded(largest).tolist() == [[largest, -largest]]
    assert np.isinf(decoded(largest * (1 + 2.0**-8))).all()


def test_an_unknown_encoding_suggests_the_nearest():
    with pytest.raises(SpecError, match="unknown encoding 'in8'; did you mean int8"):
        find_encoding("in8")
