"""Matrices of affine warps in Triton. The maths is in ``reference.py``.

What depends on the distances of taps comes as the bits of a float64: ``to_x`` and ``to_y`` of the reference are
(x, y ``along_x``, ``unit_x``) and (x ``along_y``, y, ``unit_y``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import over, real

TAPS = tl.constexpr(8)  # of the new kernel in a program's hands at once
INTEGERS = ["batch", "height", "width", "along_x", "unit_x", "along_y", "unit_y"]


@triton.jit
def matrix(params, KIND: tl.constexpr, C: tl.constexpr):
    """T, row by row."""
    zero, one = tl.full([], 0, C), tl.full([], 1, C)
    a = tl.load(params)
    if KIND == "rotate":
        return tl.cos(a), -tl.sin(a), zero, tl.sin(a), tl.cos(a), zero
    else:
        b = tl.load(params + 1)
        if KIND == "scale":
            return over(one, a), zero, zero, zero, over(one, b), zero
        elif KIND == "shear":
            return one, a, zero, b, one, zero
        else:
            return a, b, tl.load(params + 2), tl.load(params + 3), tl.load(params + 4), tl.load(params + 5)


@triton.jit
def hit(at, taps, size, BORDER: tl.constexpr):
    """Which of the taps ``at`` means."""
    if BORDER:
        at = tl.where(at < 0, 0, at)
        at = tl.where(at > size - 1, size - 1, at)
    return at == taps


@triton.jit
def along(s, taps, size, CUBIC: tl.constexpr, BORDER: tl.constexpr):
    """(X, X') of one axis: places s [P, 1], taps [1, Q]."""
    n = tl.floor(s)
    f = s - n
    g, none = 1 - f, 0 * n  # NaN where s is not finite
    left, right = hit(n, taps, size, BORDER), hit(n + 1, taps, size, BORDER)
    if CUBIC:
        before, after = hit(n - 1, taps, size, BORDER), hit(n + 2, taps, size, BORDER)
        x = tl.where(before, -0.75 * f * g * g, none) + tl.where(left, (1.25 * f - 2.25) * f * f + 1, none)
        x += tl.where(right, (1.25 * g - 2.25) * g * g + 1, none) + tl.where(after, -0.75 * g * f * f, none)
        slope = tl.where(before, -0.75 * g * (g - 2 * f), none) + tl.where(left, (3.75 * f - 4.5) * f, none)
        slope += tl.where(right, -(3.75 * g - 4.5) * g, none) + tl.where(after, -0.75 * f * (2 * g - f), none)
        return x, slope
    else:
        one = f + g
        slope = tl.where(right, one, none) - tl.where(left, one, none)
        return tl.where(left, g, none) + tl.where(right, f, none), slope


@triton.jit
def axes(
    t, p, c, height, width, along_x, unit_x, along_y, unit_y, C: tl.constexpr, CUBIC: tl.constexpr,
    BORDER: tl.constexpr,
):  # fmt: skip
    """(X, X', Y, Y') of the taps p of the new kernel and c of the given one; and where p stands, from the middle."""
    middle_x, middle_y = (width - 1).to(C) * 0.5, (height - 1).to(C) * 0.5
    x, y = (p % width).to(C) - middle_x, (p // width).to(C) - middle_y
    s_x = t[0] * x + t[1] * (y * real(along_x, C)) + t[2] * real(unit_x, C) + middle_x
    s_y = t[3] * (x * real(along_y, C)) + t[4] * y + t[5] * real(unit_y, C) + middle_y
    of_x, slope_x = along(s_x[:, None], (c % width).to(C)[None, :], width.to(C), CUBIC, BORDER)
    of_y, slope_y = along(s_y[:, None], (c // width).to(C)[None, :], height.to(C), CUBIC, BORDER)
    return of_x, slope_x, of_y, slope_y, x, y


@triton.jit(do_not_specialize=INTEGERS)
def forward(
    params, out, batch: tl.int32, height: tl.int32, width: tl.int32, along_x: tl.int64, unit_x: tl.int64,
    along_y: tl.int64, unit_y: tl.int64, KIND: tl.constexpr, NUMBERS: tl.constexpr, CUBIC: tl.constexpr,
    BORDER: tl.constexpr, C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """TAPS rows by Q columns of the matrix of one condition."""
    taps = height * width
    b = tl.program_id(0) % batch
    block = tl.program_id(0) // batch
    across = tl.cdiv(taps, Q)
    p = block // across * TAPS + tl.arange(0, TAPS)
    c = block % across * Q + tl.arange(0, Q)
    t = matrix(params + b * NUMBERS, KIND, C)
    x, _, y, _, _, _ = axes(t, p, c, height, width, along_x, unit_x, along_y, unit_y, C, CUBIC, BORDER)
    to = out + (b.to(tl.int64) * taps + p[:, None]) * taps + c[None, :]
    tl.store(to, y * x, mask=(p < taps)[:, None] & (c < taps)[None, :])


@triton.jit(do_not_specialize=INTEGERS)
def backward(
    grad, params, out, height: tl.int32, width: tl.int32, along_x: tl.int64, unit_x: tl.int64, along_y: tl.int64,
    unit_y: tl.int64, KIND: tl.constexpr, NUMBERS: tl.constexpr, CUBIC: tl.constexpr, BORDER: tl.constexpr,
    C: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """dparams of one condition."""
    taps = height * width
    b = tl.program_id(0)
    t = matrix(params + b * NUMBERS, KIND, C)
    zero = tl.full([], 0, C)
    d0, d1, d2, d3, d4, d5 = zero, zero, zero, zero, zero, zero  # of T
    row = b * 0
    while row < taps:
        p = row + tl.arange(0, TAPS)
        ds_x, ds_y = tl.zeros([TAPS, Q], C), tl.zeros([TAPS, Q], C)
        column = b * 0
        while column < taps:
            c = column + tl.arange(0, Q)
            x, slope_x, y, slope_y, _, _ = axes(
                t, p, c, height, width, along_x, unit_x, along_y, unit_y, C, CUBIC, BORDER
            )
            from_ = grad + (b.to(tl.int64) * taps + p[:, None]) * taps + c[None, :]
            g = tl.load(from_, mask=(p < taps)[:, None] & (c < taps)[None, :], other=0.0)
            ds_x += g * y * slope_x
            ds_y += g * slope_y * x
            column += Q
        _, _, _, _, x, y = axes(t, p, p, height, width, along_x, unit_x, along_y, unit_y, C, CUBIC, BORDER)
        of_x, of_y = tl.sum(ds_x, axis=1), tl.sum(ds_y, axis=1)
        d0 += tl.sum(of_x * x, axis=0)
        d1 += tl.sum(of_x * (y * real(along_x, C)), axis=0)
        d2 += tl.sum(of_x * real(unit_x, C), axis=0)
        d3 += tl.sum(of_y * (x * real(along_y, C)), axis=0)
        d4 += tl.sum(of_y * y, axis=0)
        d5 += tl.sum(of_y * real(unit_y, C), axis=0)
        row += TAPS
    to = out + b * NUMBERS
    a = tl.load(params + b * NUMBERS)
    if KIND == "rotate":
        tl.store(to, (d3 - d1) * tl.cos(a) - (d0 + d4) * tl.sin(a))
    elif KIND == "scale":
        e = tl.load(params + b * NUMBERS + 1)
        tl.store(to, over(-d0, a * a))
        tl.store(to + 1, over(-d4, e * e))
    elif KIND == "shear":
        tl.store(to, d1)
        tl.store(to + 1, d3)
    else:
        tl.store(to, d0)
        tl.store(to + 1, d1)
        tl.store(to + 2, d2)
        tl.store(to + 3, d3)
        tl.store(to + 4, d4)
        tl.store(to + 5, d5)
