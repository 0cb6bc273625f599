"""Triton kernels in Triton's interpreter. ``test_triton.py`` runs this file, in processes with TRITON_INTERPRET=1."""

from __future__ import annotations

import copy
import itertools

import fast_interpreter
import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

import weightxform as wx
from weightxform import backends
from weightxform.numerics import relative_error
from weightxform.registry import OPS
from weightxform.spectral_norm import op as room
from weightxform.spectral_norm import reference, triton_plan
from weightxform.triton_common import kernels, tables
from weightxform.verify import check_case, flatten, make_args

fast_interpreter.install()

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ON_TRITON = [op for op in OPS.values() if op.triton is not None and op.name.startswith("spectral_norm")]
CASES = [pytest.param(op, case, id=f"{op.name}-{case}") for op in ON_TRITON for case in op.cases]
FORWARD, BACKWARD = OPS["spectral_norm_fwd"], OPS["spectral_norm_bwd"]


def checked(op, case, dtype=torch.float32):
    """One case that is not among those of the op."""
    own = copy.copy(op)
    own.cases = {"own": case}
    result = check_case(own, "own", dtype, "cpu", op.triton)
    assert result.passed, result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_against_float64(op, case, dtype):
    """And two runs give the same bits."""
    with wx.backend("triton"):
        result = check_case(op, case, dtype, "cpu", op)
    assert result.passed, result


def test_every_op_of_the_room_has_a_kernel():
    names = {"spectral_norm_fwd", "spectral_norm_bwd", "spectral_norm_fwd_list", "spectral_norm_bwd_list"}
    assert {op.name for op in ON_TRITON} == names | {"spectral_norm_state_list"}
    assert "triton" in backends.available() and wx.info().kernels["triton"] == "registered, in its interpreter"


# Tiles: every length of the inner axis, in memory that allows wide accesses and in memory that does not.
SIZES = [64, 112, 256, 512, 1024, 2048, 4096, 4608, 8208]


@pytest.mark.parametrize("extra", [0, 1], ids=["aligned", "odd"])
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_every_length(size, extra):
    for dtype in (torch.float32,) if extra else (torch.float32, torch.bfloat16):
        checked(FORWARD, room._case_fwd((9, size + extra), 0, "contiguous", {}), dtype)
    checked(BACKWARD, room._case_bwd((5, size + extra), 0, "contiguous", {}))


@pytest.mark.parametrize("shape", [(48, 64), (120, 32), (250, 48), (300, 48), (33, 96)], ids=str)
@pytest.mark.parametrize("n_iter", [1, 2])
def test_v_first_aligned(shape, n_iter):
    checked(FORWARD, room._case_fwd(shape, 0, "contiguous", {"v_first": True, "n_iter": n_iter}))


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("shape", [(70, 130), (270, 200), (40, 8208)], ids=str)
def test_programs_that_take_several_groups(shape, v_first, monkeypatch):
    monkeypatch.setattr(triton_plan, "PARTS", 2)
    monkeypatch.setattr(tables, "plans", tables.Kept(4))
    checked(FORWARD, room._case_fwd(shape, 0, "contiguous", {"v_first": v_first}))


@pytest.mark.parametrize("n_iter", [0, 1, 2])
def test_rows_that_no_tile_holds_in_float64(n_iter):
    def converged(dtype, device, generator):  # a sigma of random u and v is a sum that cancels
        weight, u, v, *rest = room._case_fwd((9, 4112), 0, "contiguous", {"n_iter": n_iter})(dtype, device, generator)
        return weight, *reference.iterate(weight.to(u.dtype), u, v, 5, 1e-12, False), *rest

    checked(FORWARD, converged, torch.float64)


def test_an_address_that_is_no_multiple_of_16_bytes():
    def make(dtype, device, generator):
        weight, *rest = room._case_fwd((32, 64), 0, "contiguous", {})(dtype, device, generator)
        shifted = torch.empty(weight.numel() + 1, dtype=dtype)[1:].view(weight.shape).copy_(weight)
        assert shifted.data_ptr() % 16
        return shifted, *rest

    checked(FORWARD, make)


# Memory.


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
@pytest.mark.parametrize("dim", range(4))
def test_layouts_say_where_every_element_lies(order, dim):
    shape, inverse = (2, 3, 4, 5), [order.index(i) for i in range(4)]
    numbers = torch.arange(120).view([shape[i] for i in order]).permute(inverse)  # an element is its own address
    layout = triton_plan.layout_of(shape, numbers.stride(), dim)
    if layout is None:
        assert order != (0, 1, 2, 3) and not (order == (0, 2, 3, 1) and dim < 2)
        return
    a, m, b, period, turns, swapped = layout
    column = torch.arange(a * b)
    rows = torch.arange(m)[:, None] * b + column // b * m * b + column % b
    matrix = torch.empty_like(rows)
    matrix[:, (column % period) * turns + column // period] = rows
    assert torch.equal(matrix.T if swapped else matrix, reference.as_matrix(numbers, dim))


def test_layouts_that_are_read_in_place():
    conv = torch.empty(16, 5, 3, 3).to(memory_format=torch.channels_last)
    assert triton_plan.layout_of(tuple(conv.shape), conv.stride(), 0) is not None
    assert triton_plan.layout_of(tuple(conv.shape), conv.stride(), 1) is not None
    assert triton_plan.layout_of((31, 47), (1, 31), 0).swapped
    assert triton_plan.layout_of((31, 47), (94, 2), 0) is None  # gaps
    assert triton_plan.layout_of((5, 3), (0, 1), 0) is None  # expanded


@pytest.mark.parametrize("order", [(3, 1, 0, 2), (0, 2, 1, 3), (2, 3, 1, 0)], ids=str)
@pytest.mark.parametrize("v_first", [False, True])
def test_any_order_of_the_axes(order, v_first):
    def permuted(make, place):
        def case(dtype, device, generator):
            args = list(make(dtype, device, generator))
            stored = args[place].permute(order).contiguous()
            args[place] = stored.permute([order.index(i) for i in range(4)])
            return tuple(args)

        return case

    options = {"v_first": v_first}
    checked(FORWARD, permuted(room._case_fwd((4, 6, 3, 2), 1, "contiguous", options), 0))
    checked(BACKWARD, permuted(room._case_bwd((4, 6, 3, 2), 1, "contiguous", options), 1))
    checked(BACKWARD, permuted(room._case_bwd((4, 6, 3, 2), 1, "contiguous", options), 0))


@pytest.mark.parametrize("dout", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_and_gradients_of_other_dtypes(dtype, dout):
    checked(FORWARD, room._case_fwd((24, 40), 0, "contiguous", {}, dout), dtype)
    checked(BACKWARD, room._case_bwd((24, 40), 0, "contiguous", {}, dout), dtype)


def test_gradients_of_several_dtypes_in_one_list():
    op = OPS["spectral_norm_bwd_list"]
    args = list(make_args(op, "v_first", torch.float32, "cpu"))
    args[0] = [dout.to(DTYPES[i % 4]) for i, dout in enumerate(args[0])]
    for ours, theirs in zip(flatten(op.triton(*args)), flatten(op.reference(*args)), strict=True):
        torch.testing.assert_close(ours, theirs)


# Numbers.


@triton.jit
def narrow(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, kernels.narrow(tl.load(x + i), out.dtype.element_ty))


def test_rounding_to_bfloat16_is_that_of_torch():
    bits = torch.randint(-(2**31), 2**31, (1024,), dtype=torch.int64).int()
    bits[:8] = torch.tensor([0, -(2**31), 0x7F800000, 0x7FC00001, 0x7F800001, 0x7F7FFFFF, 0x3F808000, 0x3F818000])
    bits[8:16] = torch.tensor(
        [0x00008000, 0x00018000, 0x7F7F8000, 0x7F7F7FFF, 0x00000001, -1, -(2**31) + 0x8000, 0x8000]
    )
    x = bits.view(torch.float32)
    out = torch.empty(1024, dtype=torch.bfloat16)
    narrow[(1,)](x, out, N=1024)
    expected = x.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy tells of what a GPU does silently
@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("options", [{}, {"n_iter": 3}, {"v_first": True, "n_iter": 2}], ids=str)
def test_weights_whose_square_leaves_float32(factor, options):
    weight, u, v, *rest = room._case_fwd((40, 70), 0, "contiguous", options)(
        torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0)
    )
    weight[:20] *= 1e-6  # so that programs and groups divide by different powers
    rest[3] = 0.0  # eps
    out, state = FORWARD.triton(weight * factor, u, v, *rest)
    plain = FORWARD.triton(weight, u, v, *rest)
    assert relative_error(out, plain[0]) < 1e-6
    assert relative_error(state[:-1], plain[1][:-1]) < 1e-6
    assert relative_error(state[-1:] / factor, plain[1][-1:]) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("n_iter", [0, 1, 2])
@pytest.mark.parametrize("v_first", [False, True])
def test_weights_without_a_direction_keep_u_and_v(value, n_iter, v_first):
    options = {"n_iter": n_iter, "v_first": v_first}
    weight, u, v, *rest = make_args(FORWARD, "linear", torch.float32, "cpu")
    rest[2], rest[4] = options["n_iter"], options["v_first"]
    if value == 0:
        weight.zero_()
    weight[3, 5] = value
    out, state = FORWARD.triton(weight, u, v, *rest)
    assert torch.equal(state[:-1], torch.cat([u, v]))
    if value:
        assert not state[-1].isfinite() and not out[3, 5].isfinite()
        return
    assert state[-1] == 0 and torch.equal(out, weight)
    dout = torch.randn(weight.shape)
    dweight, dgain = BACKWARD.triton(dout, weight, state, None, 0, None)
    assert torch.equal(dweight, dout) and dgain == 0


# Modules.


class Called(TorchDispatchMode):
    """Collects the overloads of our ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "weightxform":
            self.names.append(f"{func._schema.name.removeprefix('weightxform::')}.{func._overloadname}")
        return func(*args, **(kwargs or {}))


def gradients(backend, build):
    torch.manual_seed(0)
    model = build()
    x = torch.randn(3, 5, 8, 8)
    with wx.backend(backend), Called() as called:
        y = model(x)
        y.backward(torch.randn(y.shape))
    return [y.detach(), *(p.grad for p in model.parameters()), *model.buffers()], called.names


def one():
    layer = torch.nn.Conv2d(5, 6, 3)
    layer.weight = wx.ComputedParameter(layer.weight, wx.SpectralNorm())
    return layer


def many():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(5, 6, 3), torch.nn.ConvTranspose2d(6, 4, 3), torch.nn.Flatten(), torch.nn.Linear(256, 7)
    )
    return wx.constrain(model, wx.SpectralNorm) or model


@pytest.mark.parametrize(("build", "name"), [(one, "spectral_norm_{}"), (many, "spectral_norm_{}_list")])
def test_modules(build, name):
    ours, called = gradients("triton", build)
    theirs, _ = gradients("reference", build)
    assert called == [f"{name.format(way)}.triton" for way in ("fwd", "bwd")]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


# Tables.


def addressed(planning, monkeypatch):
    """The tables that are made from now on."""
    made = []
    finish = planning.Plan.finish
    monkeypatch.setattr(planning.Plan, "finish", lambda plan: made.append(plan) or finish(plan))
    monkeypatch.setattr(tables, "plans", tables.Kept(4))
    return made


def test_a_plan_is_made_once_for_the_same_shapes(monkeypatch):
    made = addressed(triton_plan, monkeypatch)
    args = make_args(OPS["spectral_norm_fwd_list"], "some_advance", torch.float32, "cpu")
    for _ in range(3):
        OPS["spectral_norm_fwd_list"].triton(*args)
    assert len(made) == 1
    weights = [w + 1 for w in args[0]]
    assert not torch.equal(
        OPS["spectral_norm_fwd_list"].triton(weights, *args[1:])[1], OPS["spectral_norm_fwd_list"].triton(*args)[1]
    )
    assert len(made) == 1
    OPS["spectral_norm_fwd_list"].triton(*args[:6], 1e-3, *args[7:])
    assert len(made) == 2


def test_launches_do_not_grow_with_the_list():
    def launches(members, n_iter):
        layout = triton_plan.layout_of((40, 70), (70, 1), 0)
        rows = [triton_plan.ForwardMember(layout, n_iter, True)] * members
        return len(triton_plan.forward_plan(rows, torch.float32, 1e-12, False, None, True).counts)

    assert launches(1, 1) == launches(100, 1) == 3
    assert launches(100, 2) == 5


def test_a_capture_holds_its_plan_and_writes_addresses_by_value(monkeypatch):
    addressed(triton_plan, monkeypatch)
    op = OPS["spectral_norm_fwd_list"]
    args = make_args(op, "some_advance", torch.float32, "cpu")
    expected = flatten(op.triton(*args))
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    written = []
    write = tables.write_by_value
    monkeypatch.setattr(tables, "write_by_value", lambda *a: written.append(a) or write(*a))
    assert all(map(torch.equal, flatten(op.triton(*args)), expected))
    assert len(written) == 1
    with pytest.raises(
        RuntimeError, match=r"a CUDA graph is being captured.*run the same code once before the capture"
    ):
        op.triton(*make_args(op, "one", torch.float32, "cpu"))
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    (held,) = tables.plans.entries.values()
    for rows in range(1, 10):
        FORWARD.triton(torch.randn(rows, 3), torch.randn(rows), torch.randn(3), None, 0, 1, 1e-12, False, None, None)
    kept = list(tables.plans.entries.values())
    assert held in kept and len(kept) == 5


def test_values_written_on_the_device():
    values = [0, 1, -1, 2**62, -(2**63), *range(30)]
    table = tables.write_by_value(values, torch.device("cpu"))
    assert table[: len(values)].tolist() == values


# Errors.


def test_arguments_that_do_not_fit():
    weight, u, v, gain, dim, n_iter, eps, v_first, bound, out_dtype = make_args(FORWARD, "linear", torch.float32, "cpu")
    rest = eps, v_first, bound, out_dtype

    def refused(message, *args):
        with pytest.raises(RuntimeError, match=f"spectral_norm: {message}"):
            FORWARD.triton(*args)

    refused("dim is out of range", weight, u, v, gain, 2, n_iter, *rest)
    refused("u and v must lie where", weight, u.double(), v, gain, dim, n_iter, *rest)
    refused("u must have as many elements", weight, v, u, gain, dim, n_iter, *rest)
    refused("n_iter must not be negative", weight, u, v, gain, dim, -1, *rest)
    refused("gain must hold one number", weight, u, v, torch.ones(2), dim, n_iter, *rest)
    refused("weights must be float64", weight.int(), u, v, gain, dim, n_iter, *rest)
    refused("out_dtype must be", weight, u, v, gain, dim, n_iter, eps, v_first, bound, torch.int32)
    dout, weight, state, *_ = make_args(BACKWARD, "linear", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="douts must have the shapes"):
        BACKWARD.triton(dout[1:], weight, state, None, 0, None)
    with pytest.raises(RuntimeError, match="offset is out of range"):
        BACKWARD.triton(dout, weight, state[1:], None, 0, None)
    with pytest.raises(RuntimeError, match="state must be what the forward returned"):
        BACKWARD.triton(dout, weight, state.double(), None, 0, None)
