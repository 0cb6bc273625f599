"""Filter warps in Triton: matrix products along the filters. The maths is in ``reference.py``.

Conditions and taps are one axis m = (b, p), banks and taps another one c = (e, q), so that nothing but the end of an
axis is padded: K = 9 is as good as 16. A bank of filters [., F, K] is then a matrix with a row for each filter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import narrow, product


@triton.jit
def in_bank(i, filters, K: tl.constexpr):
    """Where (b, p), or (e, q), lies in a bank, from the first tap of a filter on."""
    return (i // K).to(tl.int64) * filters * K + i % K


@triton.jit
def in_matrices(m, c, banks, K: tl.constexpr):
    """Where a[m, c] lies, each of m and c as it was given its shape."""
    return (m // K).to(tl.int64) * banks * K * K + m % K * K + (c // K).to(tl.int64) * K * K + c % K


@triton.jit
def rows(bank, f, i, filters, size, K: tl.constexpr, C: tl.constexpr):
    """bank[f, i], i < size."""
    inside = (f < filters)[:, None] & (i < size)[None, :]
    return tl.load(bank + (f * K)[:, None] + in_bank(i, filters, K)[None, :], mask=inside, other=0.0).to(C)


@triton.jit(do_not_specialize=["conditions", "banks"])
def apply(
    source, a, out, filters: tl.int64, conditions: tl.int32, banks: tl.int32, TO: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, ADJOINT: tl.constexpr, F: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out[f, m] = sum over c of source[f, c] a[m, c], or for the adjoint out[f, c] = sum over m of ...

    F filters by N columns of a program, D terms of the sum at once.
    """
    size, terms = conditions * K, banks * K
    if ADJOINT:
        size, terms = terms, size
    across = tl.cdiv(size, N)
    pid = tl.program_id(0)
    f = (pid // across).to(tl.int64) * F + tl.arange(0, F)
    n = pid % across * N + tl.arange(0, N)
    total = tl.zeros([F, N], C)
    at = 0
    while at < terms:
        i = at + tl.arange(0, D)
        if ADJOINT:
            places = in_matrices(i[:, None], n[None, :], banks, K)
        else:
            places = in_matrices(n[None, :], i[:, None], banks, K)
        factors = tl.load(a + places, mask=(i < terms)[:, None] & (n < size)[None, :], other=0.0)
        total = product(rows(source, f, i, filters, terms, K, C), factors, total)
        at += D
    inside = (f < filters)[:, None] & (n < size)[None, :]
    tl.store(out + (f * K)[:, None] + in_bank(n, filters, K)[None, :], narrow(total, TO), mask=inside)


@triton.jit(do_not_specialize=["each", "conditions", "banks"])
def gram(
    grad, weight, acc, filters: tl.int64, each: tl.int64, conditions: tl.int32, banks: tl.int32, C: tl.constexpr,
    K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """acc[slice, m, c] = sum over the ``each`` filters of a slice of grad[f, m] weight[f, c], M by N of them."""
    size, terms = conditions * K, banks * K
    across = tl.cdiv(terms, N)
    part = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) // across * M + tl.arange(0, M)
    c = tl.program_id(0) % across * N + tl.arange(0, N)
    total = tl.zeros([M, N], C)
    at = part * each
    end = tl.minimum(filters, at + each)
    while at < end:
        f = at + tl.arange(0, F)
        g = rows(grad, f, m, filters, size, K, C)
        total = product(tl.trans(g), rows(weight, f, c, filters, terms, K, C), total)
        at += F
    places = in_matrices(m[:, None], c[None, :], banks, K) + part * size * terms
    tl.store(acc + places, total, mask=(m < size)[:, None] & (c < terms)[None, :])
