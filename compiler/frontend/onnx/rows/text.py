"""Classical feature extraction: n-gram counts, feature selection, thresholds (ai.onnx.ml)."""

from __future__ import annotations

import numpy as np

from skive.errors import InvalidModelError
from skive.frontend.onnx.table import Call, Unsupported, onnx_op
from skive.ir import Node
from skive.types import DType

ML = "ai.onnx.ml"


@onnx_op("ArrayFeatureExtractor", domain=ML)
def array_feature_extractor(c: Call) -> Node:
    x, index = c[0], c[1]
    y = c.make("gather", x, c.reshape(index, (index.type.size,)), axis=x.type.rank - 1)
    return c.reshape(y, (1, index.type.size)) if x.type.rank == 1 else y


@onnx_op("Binarizer", domain=ML)
def binarizer(c: Call) -> Node:
    return c.cast(c.make("greater", c[0], float(c.attr("threshold", 0.0))), c[0].dtype)


@onnx_op("TfIdfVectorizer")
def tf_idf(c: Call) -> Node:
    """Every n-gram of the pool is compared with every place and skip where it could stand."""
    x = c[0]
    pool = np.array(c.attr("pool_int64s", ()), np.int64)
    if "pool_strings" in c.attrs or not x.dtype.is_int:
        raise Unsupported("n-grams of strings")
    starts, columns = [int(v) for v in c.required("ngram_counts")], [int(v) for v in c.required("ngram_indexes")]
    weights = c.attr("weights") or [1.0] * len(columns)
    low, high = int(c.required("min_gram_length")), int(c.required("max_gram_length"))
    skips, mode = int(c.required("max_skip_count")), c.choice("mode", "TF", "IDF", "TFIDF")
    bounds = [*starts, len(pool)]
    if not columns or min(columns) < 0 or sorted(bounds) != bounds or skips < 0 or not 1 <= low <= high <= len(starts):
        raise InvalidModelError("the pool of n-grams is inconsistent")
    rows = c.cast(x if x.type.rank == 2 else c.reshape(x, (1, x.type.size)), DType.i64)
    n, length = rows.shape
    result: list[Node | None] = [None] * (max(columns) + 1)
    gram = 0
    for size in range(1, len(starts) + 1):
        grams = pool[bounds[size - 1]:bounds[size]].reshape(-1, size)
        for words in grams:
            if gram >= len(columns):
                raise InvalidModelError("there are more n-grams than indexes")
            if low <= size <= high:
                count = occurrences(c, rows, words, skips if size > 1 else 0)
                if mode == "IDF":
                    count = c.make("min", count, 1.0)
                if mode != "TF":
                    count = c.make("mul", count, float(weights[gram]))
                result[columns[gram]] = count
            gram += 1
    zero = c.full((n, 1), 0, DType.f32)
    y = c.concat([zero if v is None else v for v in result], 1)
    return y if x.type.rank == 2 else c.reshape(y, (len(result),))


def occurrences(c: Call, rows: Node, words: np.ndarray, skips: int) -> Node:
    """[N, 1]: how often `words` stand in each row, 1 to 1 + skips apart."""
    n, length = rows.shape
    counts = [c.full((n, 1), 0, DType.f32)]
    for distance in range(1, skips + 2):
        places = length - (len(words) - 1) * distance
        if places < 1:
            break
        found = c.fold("and", [c.make("equal", c.slice(rows, 1, k * distance, places), c.lit(word))
                               for k, word in enumerate(words)])
        counts.append(c.make("reduce_sum", c.cast(found, DType.f32), axes=(1,), keep=True))
    return c.fold("add", counts[1:] or counts)
