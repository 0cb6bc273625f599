"""Triton functions that several rooms use."""

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS, SUMS = tl.constexpr(64), tl.constexpr(64)  # of ``fold``


@triton.jit
def narrow(x, to: tl.constexpr):
    """``x`` in a narrower dtype. bfloat16 is rounded by hand: the interpreter truncates."""
    if to == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, (bits >> 16) | 0x40, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif to == tl.float16:
        return x.to(tl.float32).to(tl.float16)
    else:
        return x.to(to)


@triton.jit
def product(a, b, acc):
    """acc + a b, with every product and sum in the dtype of ``acc``: no tensor float."""
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def over(x, y):
    """x / y, rounded once: in float32 a plain division is not."""
    return x / y if tl.float64 == x.dtype else tl.math.div_rn(x, y)


@triton.jit
def root(x):
    """The square root, rounded once."""
    return tl.sqrt(x) if tl.float64 == x.dtype else tl.math.sqrt_rn(x)


@triton.jit
def real(bits, to: tl.constexpr):
    """The float64 with these bits: Triton hands a Python float on as float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(to)


@triton.jit
def address(field, offset, T: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in ``field``, ``offset`` (a multiple of 16) numbers further."""
    at = tl.load(field).to(tl.pointer_type(T)) + offset
    return tl.multiple_of(at, 16) if ALIGNED else at


@triton.jit(do_not_specialize=["at", *(f"x{i}" for i in range(16))])
def write(
    table, at: tl.int64, x0: tl.int64, x1: tl.int64, x2: tl.int64, x3: tl.int64, x4: tl.int64, x5: tl.int64,
    x6: tl.int64, x7: tl.int64, x8: tl.int64, x9: tl.int64, x10: tl.int64, x11: tl.int64, x12: tl.int64, x13: tl.int64,
    x14: tl.int64, x15: tl.int64,
):  # fmt: skip
    """table[at : at + 16] = x."""
    values = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    for i in tl.static_range(16):
        tl.store(table + at + i, values[i])


@triton.jit
def column_sums(acc, first, end, k, width, R: tl.constexpr):
    """The sum of the rows first to end of acc [., width] at the columns k, in float64, R rows at once."""
    total = tl.zeros([R, k.shape[0]], tl.float64)
    n = first
    while n < end:
        rows = n + tl.arange(0, R)
        inside = (rows < end)[:, None] & (k < width)[None, :]
        total += tl.load(acc + rows.to(tl.int64)[:, None] * width + k[None, :], mask=inside, other=0.0).to(tl.float64)
        n += R
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["count", "each", "width"])
def fold(acc, sums, count: tl.int32, each: tl.int32, width: tl.int64, TO: tl.constexpr):
    """sums[i] = the i-th ``each`` rows of acc [count, width], added."""
    i = tl.program_id(1)
    k = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = column_sums(acc, i * each, tl.minimum(count, i * each + each), k, width, SUMS)
    tl.store(sums + i * width + k, narrow(total, TO), mask=k < width)


def interpreted() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1: kernels run on the CPU, and on CPU tensors."""
    return not isinstance(write, triton.JITFunction)
