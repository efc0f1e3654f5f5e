"""Dequantisation of the GGML block formats, in numpy.

A tensor is a row of blocks of equal size; a block holds its scales and its packed integers. Every function here takes
`blocks`, uint8 `[N, block_bytes]`, and returns float32 `[N, block_size]`. Layouts follow ggml's `ggml-common.h`:

    Q8_0  d:f16  q:int8[32]                               x = d q
    Q4_0  d:f16  q:4 bit[32]                              x = d (q - 8)
    Q4_1  d:f16  m:f16  q:4 bit[32]                       x = d q + m
    Q5_0  d:f16  h:1 bit[32]  q:4 bit[32]                 x = d (q + 16 h - 16)
    Q5_1  d:f16  m:f16  h:1 bit[32]  q:4 bit[32]          x = d q + m
    Q2_K  16 x (scale, min):4 bit  q:2 bit[256]  d:f16  m:f16             x = d scale q - m min, groups of 16
    Q3_K  h:1 bit[256]  q:2 bit[256]  scale:6 bit[16]  d:f16              x = d (scale - 32) (q + 4 h - 4), groups of 16
    Q4_K  d:f16  m:f16  8 x (scale, min):6 bit  q:4 bit[256]              x = d scale q - m min, groups of 32
    Q5_K  d:f16  m:f16  8 x (scale, min):6 bit  h:1 bit[256]  q:4 bit[256]
    Q6_K  ql:4 bit[256]  qh:2 bit[256]  scale:int8[16]  d:f16             x = d scale (q - 32), groups of 16
    MXFP4 e:u8  q:4 bit[32]                               x = 2^(e - 127) q, q a float of 4 bits

In the 32-blocks the low nibbles are elements 0..15 and the high nibbles 16..31; in the 256-blocks a run of 32 bytes
holds elements 64c..64c+31 (low) and 64c+32..64c+63 (high).
"""

import ml_dtypes
import numpy as np

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # of MXFP4's 4 bits


def _f16(blocks, start):
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float32)  # [N, 1]


def _nibbles(packed):
    return np.concatenate([packed & 15, packed >> 4], axis=1)  # [N, 16] -> [N, 32]


def _fifth_bit(packed):
    return np.unpackbits(packed, axis=1, bitorder="little") << 4  # [N, 4] -> [N, 32]


def _q8_0(blocks):
    return _f16(blocks, 0) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks):
    return _f16(blocks, 0) * (_nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8))


def _q4_1(blocks):
    return _f16(blocks, 0) * _nibbles(blocks[:, 4:]) + _f16(blocks, 2)


def _q5_0(blocks):
    q = _nibbles(blocks[:, 6:]) | _fifth_bit(blocks[:, 2:6])
    return _f16(blocks, 0) * (q.view(np.int8) - np.int8(16))


def _q5_1(blocks):
    q = _nibbles(blocks[:, 8:]) | _fifth_bit(blocks[:, 4:8])
    return _f16(blocks, 0) * q + _f16(blocks, 2)


def _k_scales(blocks):
    """The eight 6-bit (scale, min) pairs of Q4_K and Q5_K, times d and m: two arrays `[N, 8, 1]`."""
    low, mid, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=1)
    minimum = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    return (_f16(blocks, 0) * scale)[:, :, None], (_f16(blocks, 2) * minimum)[:, :, None]


def _k_nibbles(packed):
    pairs = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(len(packed), 8, 32)  # [N, 128] -> [N, 8, 32]


def _q4_k(blocks):
    scale, minimum = _k_scales(blocks)
    return (scale * _k_nibbles(blocks[:, 16:]) - minimum).reshape(len(blocks), 256)


def _q5_k(blocks):
    scale, minimum = _k_scales(blocks)
    # bit g of byte j is the fifth bit of element j of group g
    fifth = (blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    return (scale * (_k_nibbles(blocks[:, 48:]) | (fifth << 4)) - minimum).reshape(len(blocks), 256)


def _crumbs(packed):
    """Two bits each: a run of 32 bytes holds elements 128c + 32j of shift 2j. `[N, 64]` -> `[N, 16, 16]`."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return ((packed.reshape(len(packed), 2, 1, 32) >> shifts) & 3).reshape(len(packed), 16, 16)


def _q2_k(blocks):
    scale = (_f16(blocks, 80) * (blocks[:, :16] & 15))[:, :, None]
    minimum = (_f16(blocks, 82) * (blocks[:, :16] >> 4))[:, :, None]
    return (scale * _crumbs(blocks[:, 16:80]) - minimum).reshape(len(blocks), 256)


def _q3_k(blocks):
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=1)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = _f16(blocks, 108) * ((low | (high << 4)).view(np.int8) - np.int8(32))
    # bit g of byte j is the third bit of element j of group g
    third = (blocks[:, :32][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    q = (_crumbs(blocks[:, 32:96]) | (third.reshape(len(blocks), 16, 16) << 2)).view(np.int8) - np.int8(4)
    return (scale[:, :, None] * q).reshape(len(blocks), 256)


def _mxfp4(blocks):
    exponent = blocks[:, :1].astype(np.int32) - 127
    return np.ldexp((FP4 + np.float32(0))[_nibbles(blocks[:, 1:])], exponent)  # no -0 here


def _q6_k(blocks):
    n = len(blocks)
    low = blocks[:, :128].reshape(n, 2, 2, 32)  # per half: two runs of 32 bytes
    low = np.concatenate([low & 15, low >> 4], axis=2)  # [N, 2, 4, 32]
    high = blocks[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    q = (low | ((high & 3) << 4)).view(np.int8) - np.int8(32)
    scale = _f16(blocks, 208) * blocks[:, 192:208].view(np.int8)
    return (scale[:, :, None] * q.reshape(n, 16, 16)).reshape(n, 256)


def _plain(dtype):
    return lambda blocks: blocks.view(dtype).astype(np.float32)


# ggml type id -> name, elements in a block, bytes of a block, function
TYPES = {
    0: ("F32", 1, 4, _plain(np.float32)),
    1: ("F16", 1, 2, _plain(np.float16)),
    2: ("Q4_0", 32, 18, _q4_0),
    3: ("Q4_1", 32, 20, _q4_1),
    6: ("Q5_0", 32, 22, _q5_0),
    7: ("Q5_1", 32, 24, _q5_1),
    8: ("Q8_0", 32, 34, _q8_0),
    10: ("Q2_K", 256, 84, _q2_k),
    11: ("Q3_K", 256, 110, _q3_k),
    12: ("Q4_K", 256, 144, _q4_k),
    13: ("Q5_K", 256, 176, _q5_k),
    14: ("Q6_K", 256, 210, _q6_k),
    30: ("BF16", 1, 2, _plain(ml_dtypes.bfloat16)),
    39: ("MXFP4", 32, 17, _mxfp4),
}


def dequantize(data, type_id: int):
    """uint8 `[N * block_bytes]` -> float32 `[N * block_size]`. `type_id` is a key of `TYPES`."""
    _, _, block_bytes, function = TYPES[type_id]
    return function(np.asarray(data).reshape(-1, block_bytes)).reshape(-1)
