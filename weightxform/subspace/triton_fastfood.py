"""fastfood in Triton: passes over all D elements in scratch memory. The maths is in ``reference.py``.

Scratch is [K, blocks, length]: one block of the global form, many of the stacked. A pass of the transform does the
stages of BITS bits of the index, from bit AT on; no pass is fused with another. Backward the n numbers of u are sums
over t of r[pi^-1(k + n t)], in float64: a gather, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_hadamard import butterflies
from .triton_random import FF_B, FF_G, FF_PERM, coins, draw, flip, in_turn, permuted, signs, step_word, unpermuted
from .triton_tiles import CHUNK, COUNT, FIELDS, FIRST, START, all_owned, entry_of, factor_of, key_of, owned, read, write


@triton.jit
def _span():
    return tl.arange(0, CHUNK)


@triton.jit
def _diagonal(x, key, begin, step, SIGNS: tl.constexpr, C: tl.constexpr):
    """G x of the CHUNK elements from ``begin`` on."""
    if SIGNS:
        return flip(x, signs(key, FF_G, begin, tl.full([], 0, tl.int32), step, CHUNK, C))
    else:
        pos = (begin >> 2) + tl.arange(0, CHUNK // 4)
        w0, w1, w2, w3 = draw(key, FF_G, pos, tl.full([], 1, tl.int32), step)
        words = tl.reshape(in_turn(w0, w1, w2, w3), [CHUNK])
        return coins(words).to(C) * x


@triton.jit
def _minus(key, start, k, step, C: tl.constexpr):
    """The signs B of the places ``start + k``, one draw each: 128 neighbours draw the same."""
    i = start + k
    w0, w1, w2, w3 = draw(key, FF_B, i >> 7, tl.full([], 0, tl.int32), step)
    which = (i >> 5) & 3
    word = tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))
    bit = (word << (31 - (i & 31)).to(tl.uint32)) & 0x80000000
    return bit.to(tl.uint64) << 32 if tl.float64 == C else bit


@triton.jit(do_not_specialize=["rows", "dim", "n", "length", "blocks"])
def start(
    plan, z, u, step, rows: tl.int64, dim: tl.int64, n: tl.int64, length: tl.int64, blocks: tl.int64, C: tl.constexpr,
    REDRAWN: tl.constexpr,
):  # fmt: skip
    """u = B pad(z): [K, blocks, n]."""
    i = tl.program_id(0).to(tl.int64) * CHUNK + _span()
    block, k = i // n, i % n
    b = tl.program_id(1).to(tl.int64)
    sign = _minus(key_of(plan + rows), block * length, k, step_word(step, REDRAWN), C)
    x = tl.load(z + b * dim + k, mask=k < dim, other=0.0)
    tl.store(u + b * blocks * n + i, flip(x, sign), mask=block < blocks)


@triton.jit(do_not_specialize=["total"])
def transform(x, total: tl.int64, AT: tl.constexpr, BITS: tl.constexpr):
    """The stages of the bits AT .. AT + BITS - 1 of the index, of x [total], total a multiple of 2^(AT + BITS)."""
    k = _span()
    if AT == 0:
        i = tl.program_id(0).to(tl.int64) * CHUNK + k
    else:  # 2^BITS numbers, 2^AT apart, lie next to each other here, and beside them their neighbours
        W: tl.constexpr = CHUNK >> BITS
        line = tl.program_id(0).to(tl.int64) * W + (k >> BITS)
        i = ((line >> AT) << (AT + BITS)) + ((k & ((1 << BITS) - 1)).to(tl.int64) << AT) + (line & ((1 << AT) - 1))
    y = butterflies(tl.load(x + i, mask=i < total, other=0.0), BITS)
    tl.store(x + i, y, mask=i < total)


@triton.jit
def _permutation_words(key, block, length, step):
    return draw(key, FF_PERM, block * length, tl.full([], 0, tl.int32), step)


@triton.jit(do_not_specialize=["rows", "n", "length", "bits", "blocks"])
def gather(
    plan, u, q, step, rows: tl.int64, n: tl.int64, length: tl.int64, bits: tl.int32, blocks: tl.int64, C: tl.constexpr,
    SIGNS: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """q_I = fl(G_I u[pi(I) mod n]), [K, blocks, length]."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    b = tl.program_id(1).to(tl.int64)
    word, key = step_word(step, REDRAWN), key_of(plan + rows)
    i = begin + _span()
    block = i // length
    w0, w1, w2, w3 = _permutation_words(key, block, length, word)
    v = permuted((i - block * length).to(tl.uint32), w0, w1, w2, w3, bits.to(tl.uint32))
    inside = block < blocks
    x = tl.load(u + (b * blocks + block) * n + (v.to(tl.int64) & (n - 1)), mask=inside, other=0.0)
    tl.store(q + b * blocks * length + i, _diagonal(x, key, begin, word, SIGNS, C), mask=inside)


@triton.jit(do_not_specialize=["at", "rows", "size"])
def add(
    plan, pointers, q, at: tl.int64, rows: tl.int64, size: tl.int64, T: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """theta of one chunk = theta0 + y factor; q: [K, size]."""
    member, chunk = entry_of(plan, at + tl.program_id(0))
    b = tl.program_id(1).to(tl.int64)
    row, addresses, begin = plan + rows + member * FIELDS, pointers + 2 * member, chunk * CHUNK
    low, high = owned(row, begin, CHUNK)
    full = all_owned(row, begin, CHUNK)
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    i = _span()
    inside = (i >= low) & (i < high)
    y = tl.load(q + b * size + tl.load(row + START) + begin + i, mask=inside, other=0.0) * factor_of(row, C)
    if full:
        theta = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, True) + y
        write(addresses + 1, b * count + begin - first, i, low, high, theta, T, ALIGNED, True)
    else:
        theta = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, False) + y
        write(addresses + 1, b * count + begin - first, i, low, high, theta, T, ALIGNED, False)


@triton.jit(do_not_specialize=["at", "rows", "size"])
def take(
    plan, pointers, q, at: tl.int64, rows: tl.int64, size: tl.int64, T: tl.constexpr, C: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """q = fl(g factor) where the elements of one chunk stand in the whole; q: [K, size]."""
    member, chunk = entry_of(plan, at + tl.program_id(0))
    b = tl.program_id(1).to(tl.int64)
    row, addresses, begin = plan + rows + member * FIELDS, pointers + 2 * member, chunk * CHUNK
    low, high = owned(row, begin, CHUNK)
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    i = _span()
    x = read(addresses, row, b * count + begin - first, i, low, high, T, C, ALIGNED, False) * factor_of(row, C)
    tl.store(q + b * size + tl.load(row + START) + begin + i, x, mask=(i >= low) & (i < high))


@triton.jit(do_not_specialize=["rows", "size"])
def diagonal(
    plan, q, step, rows: tl.int64, size: tl.int64, C: tl.constexpr, SIGNS: tl.constexpr, REDRAWN: tl.constexpr
):  # fmt: skip
    """q = G q, in place: [K, size]."""
    begin = tl.program_id(0).to(tl.int64) * CHUNK
    at = q + tl.program_id(1).to(tl.int64) * size + begin + _span()
    inside = begin + _span() < size
    x = tl.load(at, mask=inside, other=0.0)
    x = _diagonal(x, key_of(plan + rows), begin, step_word(step, REDRAWN), SIGNS, C)
    tl.store(at, x, mask=inside)


@triton.jit(do_not_specialize=["rows", "n", "length", "bits", "blocks", "each"])
def collect(
    plan, r, u, step, rows: tl.int64, n: tl.int64, length: tl.int64, bits: tl.int32, blocks: tl.int64, each: tl.int64,
    REDRAWN: tl.constexpr,
):  # fmt: skip
    """u[part] [K, blocks, n] = the sum of ``each`` of the length / n numbers of r that came from a place of u."""
    i = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    b, part = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    block, k = i // n, i % n
    inside = block < blocks
    word, key = step_word(step, REDRAWN), key_of(plan + rows)
    w0, w1, w2, w3 = _permutation_words(key, block, length, word)
    total = tl.zeros([256], tl.float64)
    t = part * each
    end = tl.minimum(t + each, length // n)
    while t < end:
        v = unpermuted((k + t * n).to(tl.uint32), w0, w1, w2, w3, bits.to(tl.uint32))
        at = (b * blocks + block) * length + v.to(tl.int64)
        total += tl.load(r + at, mask=inside, other=0.0).to(tl.float64)
        t += 1
    tl.store(u + (part * tl.num_programs(1) + b) * blocks * n + i, total, mask=inside)


@triton.jit(do_not_specialize=["rows", "dim", "n", "length", "blocks"])
def end(
    plan, u, c, z_bar, step, rows: tl.int64, dim: tl.int64, n: tl.int64, length: tl.int64, blocks: tl.int64,
    C: tl.constexpr, SCALED: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """z_bar_k = c_k sum over blocks of B u: u is [K, blocks, n] in float64."""
    k = tl.program_id(0).to(tl.int64) * 256 + tl.arange(0, 256)
    b = tl.program_id(1).to(tl.int64)
    inside = k < dim
    word, key = step_word(step, REDRAWN), key_of(plan + rows)
    total = tl.zeros([256], tl.float64)
    block = tl.full([], 0, tl.int64)
    while block < blocks:
        x = tl.load(u + (b * blocks + block) * n + k, mask=inside, other=0.0)
        total += flip(x, _minus(key, block * length, k, word, tl.float64))
        block += 1
    x = total.to(C)
    if SCALED:
        x *= tl.load(c + k, mask=inside, other=0.0)
    tl.store(z_bar + b * dim + k, x, mask=inside)
