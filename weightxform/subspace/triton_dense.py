"""A stored basis in Triton: theta = theta0 + E z, z_bar = E' g. E is [D, d]; a program reads a part of it once.

Rows of a table are those of the other kinds, with the first row of E as ``start``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_tiles import COUNT, FIELDS, SPREAD, START, address, entry_of, narrow

ROWS, ACROSS = tl.constexpr(32), tl.constexpr(128)  # of E in a program's hands at once
SPAN = tl.constexpr(512)  # rows of a program, backward


@triton.jit(do_not_specialize=["at", "rows"])
def forward(
    plan, pointers, z, basis, at: tl.int64, rows: tl.int64, dim, T: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """theta of ROWS elements, one member of the batch."""
    b = tl.program_id(1).to(tl.int64)
    member, chunk = entry_of(plan, at + tl.program_id(0))
    row, addresses = plan + rows + member * FIELDS, pointers + 2 * member
    count = tl.load(row + COUNT)
    i = chunk * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, ACROSS)
    from_ = basis + (tl.load(row + START) + i)[:, None] * dim
    total = tl.zeros([ROWS, ACROSS], C)
    k = 0
    while k < dim:
        columns = k + j
        x = tl.load(z + b * dim + columns, mask=columns < dim, other=0.0)
        e = tl.load(from_ + columns[None, :], mask=(i < count)[:, None] & (columns < dim)[None, :], other=0.0).to(C)
        total += e * x[None, :]
        k += ACROSS
    spread = tl.load(row + SPREAD) != 0
    t0 = tl.load(address(addresses, 0, T, False) + tl.where(spread, i * 0, i), mask=i < count, other=0.0).to(C)
    theta = narrow(t0 + tl.sum(total, axis=1), T)
    tl.store(address(addresses + 1, b * count, T, False) + i, theta, mask=i < count)


@triton.jit(do_not_specialize=["at", "rows", "work", "each"])
def backward(
    plan, pointers, basis, acc, at: tl.int64, rows: tl.int64, work: tl.int64, each: tl.int64, dim, T: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """The sums of ``each`` spans of rows for ACROSS columns: acc is [programs, K, dim]."""
    b, group = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    total = tl.zeros([ROWS, ACROSS], C)
    n = group * each
    end = tl.minimum(n + each, work)
    while n < end:
        member, chunk = entry_of(plan, at + n)
        row, addresses = plan + rows + member * FIELDS, pointers + 2 * member
        count, spread = tl.load(row + COUNT), tl.load(row + SPREAD) != 0
        first = chunk * SPAN
        last = tl.minimum(count, first + SPAN)
        from_ = basis + tl.load(row + START) * dim
        while first < last:
            i = first + tl.arange(0, ROWS)
            at_ = tl.where(spread, i * 0, b * count + i)
            g = tl.load(address(addresses, 0, T, False) + at_, mask=i < last, other=0.0).to(C)
            e = tl.load(from_ + i[:, None] * dim + j[None, :], mask=(i < last)[:, None] & (j < dim)[None, :], other=0.0)
            total += e.to(C) * g[:, None]
            first += ROWS
        n += 1
    to = acc + (group * tl.num_programs(1) + b) * dim + j
    tl.store(to, tl.sum(total, axis=0), mask=j < dim)
