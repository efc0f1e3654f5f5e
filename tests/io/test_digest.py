"""The digest is of the logical content: equal however the array is cut, different after any change."""

import ml_dtypes
import numpy as np
import pytest

from molora_jax.io.digest import digest, shard_sum, to_text


def test_blocks_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    for shape in [(), (1,), (7,), (5, 3), (4, 6, 8), (2, 3, 1, 5), (3, 70_000), (70_000, 2)]:
        x = rng.standard_normal(shape).astype(np.float32)
        for _ in range(4):
            cuts = [sorted({0, n, *rng.integers(0, n + 1, 2).tolist()}) for n in shape]
            total = 0
            for corner in np.ndindex(*[len(c) - 1 for c in cuts]):
                index = tuple(slice(c[i], c[i + 1]) for c, i in zip(cuts, corner, strict=True))
                total += shard_sum(x[index], index, shape)
            assert to_text(total) == digest(x), shape


def test_reference():
    """The definition, one element at a time."""
    x = np.array([[1.5, -0.0, np.nan], [0.0, np.inf, 3e-40]], np.float32)
    total, mask = 0, 2**64 - 1
    for i, word in enumerate(x.view(np.uint32).reshape(-1).tolist()):
        h = (word * 0xBF58476D1CE4E5B9 & mask) ^ (i * 0x9E3779B97F4A7C15 & mask)
        h = (h ^ (h >> 30)) * 0x94D049BB133111EB & mask
        total += h ^ (h >> 29)
    assert digest(x) == f"{total & mask:016x}"


@pytest.mark.parametrize(
    "dtype", [np.float32, ml_dtypes.bfloat16, np.int8, np.uint32, np.int64, bool, ml_dtypes.float8_e4m3fn]
)
def test_every_flipped_bit_and_every_exchange_shows(dtype):
    x = np.arange(16).astype(dtype).reshape(2, 8)
    seen = {digest(x)}
    for bit in range(x.nbytes * 8):
        raw = bytearray(x.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        seen.add(digest(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)))
    assert len(seen) == x.nbytes * 8 + 1
    assert digest(x[::-1]) != digest(x) or dtype is bool


def test_layout_in_memory_does_not_matter():
    x = np.arange(12.0).reshape(3, 4)
    assert digest(np.asfortranarray(x)) == digest(x) == digest(np.repeat(x, 2, 1)[:, ::2])


def test_refuses_what_has_no_bits():
    with pytest.raises(ValueError, match="no digest"):
        digest(np.array(["a"]))
