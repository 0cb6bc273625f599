"""Modulation and demodulation in Triton. The maths is in ``reference.py``; ``plane`` is O I K, the size of the weight.

The two terms of dstyle may be far larger than their difference, so what remains after the pass over G is added in
float64: there is little of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_common.kernels import column_sums, narrow, over, real, root

ROWS, ACROSS = tl.constexpr(16), tl.constexpr(64)  # of a sum over rows, in a program's hands at once


@triton.jit(do_not_specialize=["samples", "eps"])
def scales(
    weight, style, d, samples: tl.int32, outputs: tl.int32, inputs: tl.int32, eps: tl.int64, C: tl.constexpr,
    K: tl.constexpr, TAPS: tl.constexpr, N: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """d of one output channel and N samples."""
    blocks = tl.cdiv(samples, N)
    o = tl.program_id(0) // blocks
    n = tl.program_id(0) % blocks * N + tl.arange(0, N)
    p = tl.arange(0, TAPS)
    sigma = tl.zeros([N, IN], C)
    at = o * 0
    while at < inputs:
        i = at + tl.arange(0, IN)
        energy = tl.zeros([IN], C)
        for first in range(0, K, TAPS):
            inside = (i < inputs)[:, None] & (first + p < K)[None, :]
            w = tl.load(weight + (o * inputs + i[:, None]) * K + first + p[None, :], mask=inside, other=0.0).to(C)
            energy += tl.sum(w * w, axis=1)
        inside = (n < samples)[:, None] & (i < inputs)[None, :]
        s = tl.load(style + n[:, None] * inputs + i[None, :], mask=inside, other=0.0)
        sigma += s * s * energy[None, :]
        at += IN
    length = root(tl.sum(sigma, axis=1) + real(eps, C))
    tl.store(d + n * outputs + o, over(length * 0 + 1, length), mask=n < samples)


@triton.jit(do_not_specialize=["samples"])
def modulated(
    weight, style, d, out, samples: tl.int32, outputs: tl.int32, inputs: tl.int32, TO: tl.constexpr, C: tl.constexpr,
    K: tl.constexpr, SCALED: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """TILE numbers of N samples."""
    blocks, plane = tl.cdiv(samples, N), outputs * inputs * K
    j = tl.program_id(0) // blocks * TILE + tl.arange(0, TILE)
    o, i = j // (inputs * K), j // K % inputs
    w = tl.load(weight + j, mask=j < plane, other=0.0).to(C)
    for k in tl.static_range(N):
        n = tl.program_id(0) % blocks * N + k
        inside = (j < plane) & (n < samples)
        scale = tl.load(style + n * inputs + i, mask=inside, other=0.0)
        if SCALED:
            scale *= tl.load(d + n * outputs + o, mask=inside, other=0.0)
        tl.store(out + n.to(tl.int64) * plane + j, narrow(w * scale, TO), mask=inside)


@triton.jit(do_not_specialize=["samples", "each"])
def stream(
    grad, weight, style, d, dweights, dstyles, bs, energy, samples: tl.int32, outputs: tl.int32, inputs: tl.int32,
    each: tl.int32, C: tl.constexpr, K: tl.constexpr, SCALED: tl.constexpr, NEED_WEIGHT: tl.constexpr,
    NEED_STYLE: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """What a pass over G gives, for OUT by IN channels and ``each`` samples.

    ``dweights`` [parts of the samples, O, I, K] and ``dstyles`` [parts of O, N, I] are the first terms, ``bs`` [parts
    of I, N, O] is b, ``energy`` [O, I] is E.
    """
    across, plane = tl.cdiv(inputs, IN), outputs * inputs * K
    o_part, i_part, part = tl.program_id(0) // across, tl.program_id(0) % across, tl.program_id(1)
    o, i, p = o_part * OUT + tl.arange(0, OUT), i_part * IN + tl.arange(0, IN), tl.arange(0, TAPS)
    there = (o < outputs)[:, None] & (i < inputs)[None, :]
    channels = o[:, None] * inputs + i[None, :]
    inside = there[:, :, None] & (p < K)[None, None, :]
    places = channels[:, :, None] * K + p[None, None, :]
    w = tl.load(weight + places, mask=inside, other=0.0).to(C)
    dw = tl.zeros([OUT, IN, TAPS], C)
    n = part * each
    end = tl.minimum(samples, n + each)
    while n < end:
        g = tl.load(grad + n.to(tl.int64) * plane + places, mask=inside, other=0.0).to(C)
        s = tl.load(style + n * inputs + i, mask=i < inputs, other=0.0)
        scale = tl.zeros([OUT], C) + 1
        if SCALED:
            scale = tl.load(d + n * outputs + o, mask=o < outputs, other=0.0)
        a = tl.sum(g * w, axis=2)
        if NEED_WEIGHT:
            dw += g * (scale[:, None] * s[None, :])[:, :, None]
        if NEED_STYLE:
            to = dstyles + (o_part * samples + n).to(tl.int64) * inputs + i
            tl.store(to, tl.sum(scale[:, None] * a, axis=0), mask=i < inputs)
        if SCALED:
            to = bs + (i_part * samples + n).to(tl.int64) * outputs + o
            tl.store(to, tl.sum(s[None, :] * a, axis=1), mask=o < outputs)
        n += 1
    if NEED_WEIGHT:
        tl.store(dweights + part.to(tl.int64) * plane + places, dw, mask=inside)
    if SCALED:
        tl.store(energy + channels, tl.sum(w * w, axis=2), mask=there & (part == 0))


@triton.jit(do_not_specialize=["parts", "width"])
def cubes(bs, d, t, parts: tl.int32, width: tl.int32):
    """t [N, O] = d^3 b, float64."""
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    scale = tl.load(d + j, mask=j < width, other=0.0).to(tl.float64)
    tl.store(t + j, scale * scale * scale * column_sums(bs, parts * 0, parts, j, width, ROWS), mask=j < width)


@triton.jit(do_not_specialize=["parts", "samples"])
def finish_style(
    dstyles, style, t, energy, out, parts: tl.int32, samples: tl.int32, outputs: tl.int32, inputs: tl.int32,
    C: tl.constexpr,
):  # fmt: skip
    """dstyle [N, I]."""
    width = samples * inputs
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    n, i = j // inputs, j % inputs
    total = tl.zeros([ROWS, ACROSS], tl.float64)
    row = parts * 0
    while row < outputs:
        o = row + tl.arange(0, ROWS)
        inside = (o < outputs)[:, None] & (j < width)[None, :]
        e = tl.load(energy + o[:, None] * inputs + i[None, :], mask=inside, other=0.0)
        total += tl.load(t + n[None, :] * outputs + o[:, None], mask=inside, other=0.0) * e.to(tl.float64)
        row += ROWS
    s = tl.load(style + j, mask=j < width, other=0.0).to(tl.float64)
    first = column_sums(dstyles, parts * 0, parts, j, width, ROWS)
    tl.store(out + j, (first - s * tl.sum(total, axis=0)).to(C), mask=j < width)


@triton.jit(do_not_specialize=["parts", "samples"])
def finish_weight(
    dweights, weight, style, t, out, parts: tl.int32, samples: tl.int32, outputs: tl.int32, inputs: tl.int32,
    TO: tl.constexpr, C: tl.constexpr, K: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """dweight, of ACROSS pairs of channels."""
    count = outputs * inputs
    j = tl.program_id(0) * ACROSS + tl.arange(0, ACROSS)
    o, i = j // inputs, j % inputs
    total = tl.zeros([ROWS, ACROSS], tl.float64)
    row = parts * 0
    while row < samples:
        n = row + tl.arange(0, ROWS)
        inside = (n < samples)[:, None] & (j < count)[None, :]
        s = tl.load(style + n[:, None] * inputs + i[None, :], mask=inside, other=0.0).to(tl.float64)
        total += tl.load(t + n[:, None] * outputs + o[None, :], mask=inside, other=0.0) * (s * s)
        row += ROWS
    second = tl.sum(total, axis=0).to(C)[:, None]
    for first in range(0, K, TAPS):
        p = first + tl.arange(0, TAPS)
        inside = (j < count)[:, None] & (p < K)[None, :]
        places = j[:, None] * K + p[None, :]
        dw = tl.zeros([ACROSS, TAPS], C)
        part = parts * 0
        while part < parts:
            dw += tl.load(dweights + part.to(tl.int64) * count * K + places, mask=inside, other=0.0)
            part += 1
        w = tl.load(weight + places, mask=inside, other=0.0).to(C)
        tl.store(out + places, narrow(dw - w * second, TO), mask=inside)
