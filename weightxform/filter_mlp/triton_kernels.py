"""The network over each filter in Triton. The maths is in ``reference.py``; nothing of [B, F, H] leaves a program.

Blocks are F filters, J hidden units, P taps of a result; Q taps of a sum over taps at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import COLUMNS, SUMS, column_sums, narrow, over, product

Q = tl.constexpr(16)


@triton.jit
def tanh(x):
    """By the continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))), nine levels of it, up to 1/2, else by exp."""
    z = x * x
    upper = (((z + 990) * z + 135135) * z + 4729725) * z + 34459425
    lower = (((45 * z + 13860) * z + 945945) * z + 16216200) * z + 34459425
    t = tl.exp(-2 * tl.abs(x))
    large = over(1 - t, 1 + t)
    return tl.where(tl.abs(x) < 0.5, x * over(upper, lower), tl.where(x < 0, -large, large))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """(activation(x), activation'(x))."""
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0, x), (x > 0).to(x.dtype)
    elif ACTIVATION == "tanh":
        h = tanh(x)
        return h, 1 - h * h
    else:
        t = tl.exp(-tl.abs(x))
        near = over(t * 0 + 1, 1 + t)
        s, rest = tl.where(x < 0, t * near, near), tl.where(x < 0, near, t * near)  # rest = 1 - s
        return x * s, s * (1 + x * rest)


@triton.jit
def matrix(source, i, k, rows, columns, C: tl.constexpr):
    """source[i, k] of a matrix [rows, columns]; ``i`` and ``k`` as they were given their shapes."""
    return tl.load(source + i * columns + k, mask=(i < rows) & (k < columns), other=0.0).to(C)


@triton.jit
def over_taps(source, f, factors, j, filters, hidden, K: tl.constexpr, C: tl.constexpr, SECOND: tl.constexpr):
    """[F, J]: the sum over q of source[f, q] times w1[j, q], or w2[q, j] for the SECOND layer."""
    total = tl.zeros([f.shape[0], j.shape[0]], C)
    for at in range(0, K, Q):
        q = at + tl.arange(0, Q)
        if SECOND:
            x = matrix(factors, q[:, None], j[None, :], K, hidden, C)
        else:
            x = matrix(factors, j[None, :], q[:, None], hidden, K, C)
        total = product(matrix(source, f[:, None], q[None, :], filters, K, C), x, total)
    return total


@triton.jit(do_not_specialize=["batch"])
def forward(
    weight, v, w1, w2, b2, out, filters: tl.int64, batch: tl.int32, hidden: tl.int32, TO: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, B: tl.constexpr,
    F: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """B conditions, F filters, P taps."""
    parts: tl.constexpr = (K + P - 1) // P
    together = tl.cdiv(batch, B)
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    b = rest % together * B + tl.arange(0, B)
    first = (rest // together).to(tl.int64) * F
    f, p = first + tl.arange(0, F), part * P + tl.arange(0, P)
    total = tl.zeros([B * F, P], C)
    at = rest * 0
    while at < hidden:
        j = at + tl.arange(0, J)
        u = over_taps(weight, f, w1, j, filters, hidden, K, C, False)
        bias = matrix(v, b[:, None], j[None, :], batch, hidden, C)
        h, _ = activated(u[None, :, :] + bias[:, None, :], ACTIVATION)
        total = product(tl.reshape(h, [B * F, J]), matrix(w2, p[None, :], j[:, None], K, hidden, C), total)
        at += J
    row = tl.arange(0, B * F)
    of_filter, of_condition = first + row % F, rest % together * B + row // F
    total += tl.load(b2 + p, mask=p < K, other=0.0)[None, :]
    if RESIDUAL:
        total += matrix(weight, of_filter[:, None], p[None, :], filters, K, C)
    inside = ((of_filter < filters) & (of_condition < batch))[:, None] & (p < K)[None, :]
    to = out + ((of_condition * filters + of_filter) * K)[:, None] + p[None, :]
    tl.store(to, narrow(total, TO), mask=inside)


@triton.jit(do_not_specialize=["each", "batch"])
def backward(
    grad, weight, v, w1, w2, dweights, dvs, dlayers, filters: tl.int64, each: tl.int64, batch: tl.int32,
    hidden: tl.int32, C: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    NEED_WEIGHT: tl.constexpr, F: tl.constexpr, J: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """J hidden units and P taps, for all conditions and ``each`` blocks of filters, one after another.

    ``dvs`` is [blocks of filters, B, H], ``dweights`` [blocks of hidden units, F, K], ``dlayers`` [groups of blocks,
    H K + K H + K]: dw1, dw2 and db2.
    """
    parts: tl.constexpr = (K + P - 1) // P
    blocks = tl.maximum(tl.cdiv(hidden, J), 1)
    part, rest = tl.program_id(0) % parts, tl.program_id(0) // parts
    unit, group = rest % blocks, (rest // blocks).to(tl.int64)
    j, p = unit * J + tl.arange(0, J), part * P + tl.arange(0, P)
    dw1, dw2, db2 = tl.zeros([J, P], C), tl.zeros([P, J], C), tl.zeros([P], C)
    n = group * each
    end = tl.minimum(n + each, tl.cdiv(filters, F))
    while n < end:
        f = n * F + tl.arange(0, F)
        u = over_taps(weight, f, w1, j, filters, hidden, K, C, False)
        e, g = tl.zeros([F, J], C), tl.zeros([F, P], C)  # over the conditions
        b = unit * 0
        while b < batch:
            of_b = grad + b * filters * K
            bias = tl.load(v + b * hidden + j, mask=j < hidden, other=0.0)
            h, slope = activated(u + bias[None, :], ACTIVATION)
            e_b = over_taps(of_b, f, w2, j, filters, hidden, K, C, True) * slope
            g_b = matrix(of_b, f[:, None], p[None, :], filters, K, C)
            dw2 = product(tl.trans(g_b), h, dw2)
            e += e_b
            g += g_b
            if part == 0:
                tl.store(dvs + (n * batch + b) * hidden + j, tl.sum(e_b, axis=0), mask=j < hidden)
            b += 1
        dw1 = product(tl.trans(e), matrix(weight, f[:, None], p[None, :], filters, K, C), dw1)
        db2 += tl.sum(g, axis=0)
        if NEED_WEIGHT:
            start = tl.where(unit == 0, g, 0) if RESIDUAL else tl.zeros([F, P], C)
            dw = product(e, matrix(w1, j[:, None], p[None, :], hidden, K, C), start)
            to = dweights + ((unit * filters + f) * K)[:, None] + p[None, :]
            tl.store(to, dw, mask=(f < filters)[:, None] & (p < K)[None, :])
        n += 1
    to = dlayers + group * (2 * hidden * K + K)
    inside = (j < hidden)[:, None] & (p < K)[None, :]
    tl.store(to + j[:, None] * K + p[None, :], dw1, mask=inside)
    tl.store(to + hidden * K + p[None, :] * hidden + j[:, None], tl.trans(dw2), mask=inside)
    if unit == 0:
        tl.store(to + 2 * hidden * K + p, db2, mask=p < K)


@triton.jit(do_not_specialize=["count"])
def finish_layers(dlayers, dw1, dw2, db2, count: tl.int32, layer: tl.int32, taps: tl.int32, C: tl.constexpr):
    """dw1, dw2 and db2 from their parts; ``layer`` is H K."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sums(dlayers, count * 0, count, k, 2 * layer + taps, SUMS).to(C)
    tl.store(dw1 + k, total, mask=k < layer)
    tl.store(dw2 + k - layer, total, mask=(k >= layer) & (k < 2 * layer))
    tl.store(db2 + k - 2 * layer, total, mask=(k >= 2 * layer) & (k < 2 * layer + taps))
