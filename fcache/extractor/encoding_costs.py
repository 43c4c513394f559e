"""What each encoding would take: measured on the features of one batch, for the plan of an extraction."""

from collections.abc import Mapping, Sequence

import numpy as np

from fcache.cache_spec import DataError, LevelSpec, encoding_names, find_encoding
from fcache.cache_spec.encodings import Encoding
from fcache.cache_spec.shardfile import ZSTD


def encoding_costs(features: Mapping[str, np.ndarray], levels: Sequence[LevelSpec]) -> dict[str, float | None]:
    """Bytes of a record in every encoding, compressed where the encoding is made for it; None where it does not fit.

    `features` are float32 [B, *level.shape] by level. Tables are fitted to this batch: those of an extraction are
    fitted to more samples, so that its bytes differ a little.
    """
    return {name: _bytes(find_encoding(name), features, levels) for name in encoding_names()}


def _bytes(encoding: Encoding, features: Mapping[str, np.ndarray], levels: Sequence[LevelSpec]) -> float | None:
    total, records = 0, 1
    for level in levels:
        x = features[level.name]
        records = len(x)
        if float(np.abs(x).max()) > encoding.largest:
            return None
        tables: Mapping[str, np.ndarray] = {}
        if encoding.fit is not None:
            tables = encoding.fit.tables(encoding.fit.add(encoding.fit.start(level), x, level), level)
        try:
            stored = encoding.encode(x, level, tables, np)
        except DataError:
            return None
        for part in encoding.parts(level):
            array = stored[part.suffix]
            compressed = part.compression == "zstd"
            total += sum(len(ZSTD.encode(np.ascontiguousarray(r))) for r in array) if compressed else array.nbytes
    return total / records
