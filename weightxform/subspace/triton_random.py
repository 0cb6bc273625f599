"""Philox4x32-10 in Triton, and what is drawn from it: ``philox.py`` says what each draw is.

``tl.philox`` is not used: with counters of 64 bits it silently is another generator. Words are uint32; a sign is the
sign bit to be flipped, in the unsigned type of the numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import philox

PERM, SIGN_IN, SIGN_OUT, ENTRY, FF_B, FF_G, FF_PERM = (
    tl.constexpr(s)
    for s in (philox.PERM, philox.SIGN_IN, philox.SIGN_OUT, philox.ENTRY, philox.FF_B, philox.FF_G, philox.FF_PERM)
)


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Ten rounds; everything is uint32."""
    for _ in tl.static_range(10):
        p = c0.to(tl.uint64) * 0xD2511F53
        q = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (q >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = q.to(tl.uint32)
        c3 = p.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def draw(key, stream: tl.constexpr, pos, column, step):
    """Four words for each ``pos`` (int64) and ``column`` (int32); key: the two words and the step are scalars."""
    k0, k1 = key
    # A draw of 64-bit counters, written as four words. Zeros give every word the shape of the draw.
    shape = pos.to(tl.uint32) * 0 + column.to(tl.uint32) * 0
    c0 = pos.to(tl.uint32) + shape
    c1 = ((pos >> 32).to(tl.uint32) | (stream << 24)) + shape
    return philox4x32(k0, k1, c0, c1, column.to(tl.uint32) + shape, step + shape)


@triton.jit
def step_word(step, REDRAWN: tl.constexpr):
    if REDRAWN:
        return tl.load(step).to(tl.uint32)
    else:
        return tl.full([], 0, tl.uint32)


@triton.jit
def in_turn(w0, w1, w2, w3):
    """[...] x 4 -> [..., 2, 2]: word after word along the last axes."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def spread_bits(words, C: tl.constexpr):
    """The 32 bits of each word, lowest first, as signs of C: [N] -> [N, 32]."""
    up = 31 - tl.arange(0, 32).to(tl.uint32)
    bits = (words[:, None] << up[None, :]) & 0x80000000
    return bits.to(tl.uint64) << 32 if tl.float64 == C else bits


@triton.jit
def signs(key, stream: tl.constexpr, begin, column, step, N: tl.constexpr, C: tl.constexpr):
    """Signs of the N elements from ``begin`` on; both are multiples of 128."""
    pos = (begin >> 7) + tl.arange(0, N // 128)
    w0, w1, w2, w3 = draw(key, stream, pos, column, step)
    return tl.reshape(spread_bits(tl.reshape(in_turn(w0, w1, w2, w3), [N // 32]), C), [N])


@triton.jit
def flip(x, sign):
    if x.dtype == tl.float64:
        return (x.to(tl.uint64, bitcast=True) ^ sign).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def coins(word):
    """The sum of 31 coins: 2 popcount(word >> 1) - 31."""
    x = word >> 1
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return 2 * ((x * 0x01010101) >> 24).to(tl.int32) - 31


@triton.jit
def permuted(x, w0, w1, w2, w3, bits):
    """pi(x) of a block of 2^bits places; x, bits: uint32."""
    mask = (tl.full([], 1, tl.uint32) << bits) - 1
    shift = (bits + 1) >> 1
    x = ((x + w3) & mask) * (w0 | 1) & mask
    x ^= x >> shift
    x = x * (w1 | 1) & mask
    x ^= x >> shift
    return x * (w2 | 1) & mask


@triton.jit
def _inverse(a):
    """1/a modulo 2^32 for an odd a: right to 3 bits, and each step doubles them."""
    x = a
    for _ in tl.static_range(4):
        x *= 2 - a * x
    return x


@triton.jit
def unpermuted(x, w0, w1, w2, w3, bits):
    """The inverse of ``permuted``; an xorshift by half of the bits or more is its own."""
    mask = (tl.full([], 1, tl.uint32) << bits) - 1
    shift = (bits + 1) >> 1
    x = x * _inverse(w2 | 1) & mask
    x ^= x >> shift
    x = x * _inverse(w1 | 1) & mask
    x ^= x >> shift
    return (x * _inverse(w0 | 1) - w3) & mask
