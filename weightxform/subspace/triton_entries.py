"""rademacher and gaussian in Triton: every entry of P is drawn. The maths is in ``reference.py``.

One draw gives the signs of 128 elements in one column, or the coins of 4. Forward, a program holds elements and walks
over the columns, in their order; backward it holds columns and walks over the elements, and only its last step adds
numbers of different threads. KB members of a batch share what is drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_random import ENTRY, coins, draw, flip, in_turn, spread_bits, step_word
from .triton_tiles import (
    CHUNK,
    COUNT,
    FIELDS,
    FIRST,
    SPREAD,
    address,
    all_owned,
    entry_of,
    factor_of,
    key_of,
    narrow,
    owned,
    read,
    write,
)

AT_ONCE = tl.constexpr(8)  # columns whose signs are drawn together
COLUMNS = tl.constexpr(128)  # of a program, backward
QUADS = tl.constexpr(8)  # draws of one column at once, backward


@triton.jit
def _batched(z, b, batch, j, dim, KB: tl.constexpr):
    """z_j of KB members, [KB, 1]; zero beyond the last column: a sum that began at +0 is never -0, so it stays."""
    k = b + tl.arange(0, KB)
    return tl.load(z + k.to(tl.int64) * dim + j, mask=(k < batch) & (j < dim), other=0.0)[:, None]


@triton.jit
def _add_signed(acc, words, z, b, batch, j, dim, KB: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    sign = tl.reshape(spread_bits(words, C), [1, N])
    x = tl.broadcast_to(_batched(z, b, batch, j, dim, KB), [KB, N])
    return acc + flip(x, tl.broadcast_to(sign, [KB, N]))


@triton.jit
def _signed_sums(z, key, begin, step, b, batch, dim, KB: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """sum_j +-z_j of the N elements from ``begin`` on, [KB, N]."""
    acc = tl.zeros([KB, N], C)
    pos = ((begin >> 7) + tl.arange(0, N // 128))[:, None]
    j = tl.full([], 0, tl.int32)
    while j < dim:
        words = in_turn(*draw(key, ENTRY, pos, (j + tl.arange(0, AT_ONCE))[None, :], step))
        # [N / 128, columns, words] -> [N / 32, columns]
        words = tl.permute(tl.reshape(words, [N // 128, AT_ONCE, 4]), (0, 2, 1))
        even, odd = tl.split(tl.reshape(words, [N // 32, 4, 2]))
        w04, w26 = tl.split(tl.reshape(even, [N // 32, 2, 2]))
        w15, w37 = tl.split(tl.reshape(odd, [N // 32, 2, 2]))
        w0, w4 = tl.split(w04)
        w1, w5 = tl.split(w15)
        w2, w6 = tl.split(w26)
        w3, w7 = tl.split(w37)
        acc = _add_signed(acc, w0, z, b, batch, j, dim, KB, N, C)
        acc = _add_signed(acc, w1, z, b, batch, j + 1, dim, KB, N, C)
        acc = _add_signed(acc, w2, z, b, batch, j + 2, dim, KB, N, C)
        acc = _add_signed(acc, w3, z, b, batch, j + 3, dim, KB, N, C)
        acc = _add_signed(acc, w4, z, b, batch, j + 4, dim, KB, N, C)
        acc = _add_signed(acc, w5, z, b, batch, j + 5, dim, KB, N, C)
        acc = _add_signed(acc, w6, z, b, batch, j + 6, dim, KB, N, C)
        acc = _add_signed(acc, w7, z, b, batch, j + 7, dim, KB, N, C)
        j += AT_ONCE
    return acc


@triton.jit
def _coin_sums(z, key, begin, step, b, batch, dim, KB: tl.constexpr, N: tl.constexpr, C: tl.constexpr):
    """sum_j G_j z_j of the N elements from ``begin`` on, [KB, N]."""
    a0 = tl.zeros([KB, N // 4], C)
    a1 = a0
    a2 = a0
    a3 = a0
    pos = (begin >> 2) + tl.arange(0, N // 4)
    j = tl.full([], 0, tl.int32)
    while j < dim:
        w0, w1, w2, w3 = draw(key, ENTRY, pos, j, step)
        x = _batched(z, b, batch, j, dim, KB)
        a0 += coins(w0).to(C)[None, :] * x
        a1 += coins(w1).to(C)[None, :] * x
        a2 += coins(w2).to(C)[None, :] * x
        a3 += coins(w3).to(C)[None, :] * x
        j += 1
    return tl.reshape(in_turn(a0, a1, a2, a3), [KB, N])


@triton.jit(do_not_specialize=["at", "rows", "batch", "dim"])
def forward(
    plan, pointers, z, step, at: tl.int64, rows: tl.int64, batch: tl.int32, dim: tl.int32, T: tl.constexpr,
    C: tl.constexpr, SIGNS: tl.constexpr, KB: tl.constexpr, ALIGNED: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """theta of CHUNK / 4 elements and KB members of the batch."""
    N: tl.constexpr = CHUNK // 4
    member, chunk = entry_of(plan, at + tl.program_id(0))
    row = plan + rows + member * FIELDS
    begin = chunk * N
    b = tl.program_id(1) * KB
    word, key = step_word(step, REDRAWN), key_of(row)
    if SIGNS:
        acc = _signed_sums(z, key, begin, word, b, batch, dim, KB, N, C)
    else:
        acc = _coin_sums(z, key, begin, word, b, batch, dim, KB, N, C)
    y = acc * factor_of(row, C)
    low, high = owned(row, begin, N)
    full = all_owned(row, begin, N)
    first, count = tl.load(row + FIRST), tl.load(row + COUNT)
    k = b + tl.arange(0, KB)[:, None]
    i = tl.arange(0, N)[None, :]
    addresses = pointers + 2 * member
    if KB > 1:
        theta = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, False) + y
        to = address(addresses + 1, begin - first, T, False) + (k.to(tl.int64) * count + i)
        tl.store(to, narrow(theta, T), mask=(k < batch) & (i >= low) & (i < high))
    elif full:
        theta = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, True) + y
        write(addresses + 1, begin - first, i, low, high, theta, T, ALIGNED, True)
    else:
        theta = read(addresses, row, begin - first, i, low, high, T, C, ALIGNED, False) + y
        write(addresses + 1, begin - first, i, low, high, theta, T, ALIGNED, False)


@triton.jit
def _gradients(addresses, row, offset, i, low, high, b, batch, T: tl.constexpr, C: tl.constexpr, KB: tl.constexpr):
    """fl(g factor) of the elements ``offset + i``, of KB members: [KB, N]."""
    k = b + tl.arange(0, KB)[:, None]
    inside = (k < batch) & ((i >= low) & (i < high))[None, :]
    at = k.to(tl.int64) * tl.load(row + COUNT) + (offset + i)[None, :]
    at = tl.where(tl.load(row + SPREAD) != 0, at * 0, at)
    x = tl.load(tl.load(addresses).to(tl.pointer_type(T)) + at, mask=inside, other=0.0).to(C)
    return x * factor_of(row, C)


@triton.jit
def _signed_columns(
    addresses, row, begin, step, b, batch, j, T: tl.constexpr, C: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """The sums of +-g over CHUNK elements, [KB, COLUMNS] in float64."""
    low, high = owned(row, begin, CHUNK)
    first, key = tl.load(row + FIRST), key_of(row)
    acc = tl.zeros([KB, 32, COLUMNS], C)
    n = low // 128
    while n * 128 < high:
        words = draw(key, ENTRY, (begin >> 7) + n + j.to(tl.int64) * 0, j, step)
        for w in tl.static_range(4):
            i = n * 128 + w * 32 + tl.arange(0, 32)
            x = _gradients(addresses, row, begin - first, i, low, high, b, batch, T, C, KB)
            sign = tl.trans(spread_bits(words[w], C))
            acc += flip(
                tl.broadcast_to(x[:, :, None], [KB, 32, COLUMNS]), tl.broadcast_to(sign[None, :, :], [KB, 32, COLUMNS])
            )
        n += 1
    return tl.sum(acc.to(tl.float64), axis=1)


@triton.jit
def _coin_columns(
    addresses, row, begin, step, b, batch, j, T: tl.constexpr, C: tl.constexpr, KB: tl.constexpr
):  # fmt: skip
    """The sums of G g over CHUNK elements, [KB, COLUMNS] in float64."""
    low, high = owned(row, begin, CHUNK)
    first, key = tl.load(row + FIRST), key_of(row)
    acc = tl.zeros([KB, QUADS, COLUMNS], tl.float64)
    n = low // (4 * QUADS) * QUADS
    while n * 4 < high:
        quads = n + tl.arange(0, QUADS)
        words = draw(key, ENTRY, ((begin >> 2) + quads)[:, None], j[None, :], step)
        four = tl.zeros([KB, QUADS, COLUMNS], C)
        for w in tl.static_range(4):
            x = _gradients(addresses, row, begin - first, quads * 4 + w, low, high, b, batch, T, C, KB)
            four += x[:, :, None] * coins(words[w]).to(C)[None, :, :]
        acc += four.to(tl.float64)
        n += QUADS
    return tl.sum(acc, axis=1)


@triton.jit(do_not_specialize=["at", "work", "rows", "each", "batch", "dim"])
def backward(
    plan, pointers, acc, step, at: tl.int64, work: tl.int64, rows: tl.int64, each: tl.int64, batch: tl.int32,
    dim: tl.int32, T: tl.constexpr, C: tl.constexpr, SIGNS: tl.constexpr, KB: tl.constexpr, REDRAWN: tl.constexpr,
):  # fmt: skip
    """The sums of ``each`` chunks, for COLUMNS columns and KB members: acc [programs, batch, dim], float64."""
    program = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2) * KB
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    word = step_word(step, REDRAWN)
    n = program * each
    end = tl.minimum(n + each, work)
    total = tl.zeros([KB, COLUMNS], tl.float64)
    while n < end:
        member, chunk = entry_of(plan, at + n)
        row = plan + rows + member * FIELDS
        if SIGNS:
            total += _signed_columns(pointers + 2 * member, row, chunk * CHUNK, word, b, batch, j, T, C, KB)
        else:
            total += _coin_columns(pointers + 2 * member, row, chunk * CHUNK, word, b, batch, j, T, C, KB)
        n += 1
    k = b + tl.arange(0, KB)[:, None]
    inside = (k < batch) & (j < dim)[None, :]
    tl.store(acc + (program * batch + k) * dim + j[None, :], total, mask=inside)
