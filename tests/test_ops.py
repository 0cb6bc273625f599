"""Every registered op, driven by its declaration: against float64, opcheck, and what must not change a result."""

from __future__ import annotations

import pytest
import torch

import weightxform as wx
from weightxform import backends
from weightxform.registry import OPS, Op, register
from weightxform.verify import check_case, convert, flatten, make_args

CASES = [pytest.param(op, case, id=f"{op.name}-{case}") for op in OPS.values() for case in op.cases]
DTYPES = [pytest.param(*p.values, d, id=f"{p.id}-{d}") for p in CASES for d in p.values[0].dtypes]
# enough for what no case changes
SHAPED = ("linear", "conv_transpose", "large", "mixed", "v_first_large", "conv3", "experts", "silu", "rotate_dilated")


def served() -> list[str]:
    """The backends that serve CPU tensors here."""
    return [name for name in backends.available() if name in ("cpu", "reference")]


@pytest.mark.parametrize(("op", "case", "dtype"), DTYPES)
def test_against_float64(op: Op, case: str, dtype: torch.dtype) -> None:
    for name in served():
        if name in backends.available(op.name):
            with wx.backend(name):
                result = check_case(op, case, dtype, "cpu", op)
            assert result.passed, f"{name}: {result}"


@pytest.mark.parametrize(("op", "case"), [p for p in CASES if p.values[1] in SHAPED])
def test_opcheck(op: Op, case: str) -> None:
    for overload in (op.default, op.reference_overload):
        torch.library.opcheck(overload, make_args(op, case, torch.float32, "cpu"))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_fake_agrees_with_real(op: Op, case: str) -> None:
    """Shapes, dtypes and strides, which opcheck compares for only some of the cases above."""
    args = make_args(op, case, torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32, "cpu")
    for real, fake in zip(flatten(op(*args)), flatten(op.fake(*convert(args, lambda t: t.to("meta")))), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


@pytest.mark.parametrize(("op", "case"), [p for p in CASES if p.values[1] in SHAPED])
def test_same_bits_for_any_number_of_threads(op: Op, case: str) -> None:
    args = make_args(op, case, torch.float32, "cpu")
    outputs = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        outputs.append(flatten(op(*args)))
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


@pytest.mark.parametrize(("op", "case"), CASES)
def test_floor_counts_bytes(op: Op, case: str) -> None:
    args = make_args(op, case, torch.float32, "cpu")
    tensors = [*flatten(args), *flatten(op(*args))]
    matrices = sum(t.nbytes for t in tensors if t.ndim > 1)
    assert matrices <= op.bytes_moved(*args) <= sum(t.nbytes for t in tensors)


def test_second_registration_of_a_name_is_refused() -> None:
    op = next(iter(OPS.values()))
    with pytest.raises(ValueError, match="registered already"):
        register(op)
