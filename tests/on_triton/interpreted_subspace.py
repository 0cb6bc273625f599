"""Triton kernels of projections in Triton's interpreter. ``test_triton.py`` runs this file, as ``interpreted.py``.

Every case of every op in float32, and one of each kernel in the other dtypes. The interpreter takes minutes for all of
them: those marked ``long`` are not part of ``make test``, which has every kernel once.

    TRITON_INTERPRET=1 pytest tests/on_triton/interpreted_subspace.py
"""

from __future__ import annotations

import fast_interpreter
import pytest
import torch
import triton
import triton.language as tl

import weightxform as wx
from weightxform.registry import OPS
from weightxform.subspace import philox, triton_entries, triton_plan, triton_random
from weightxform.subspace.plan import make_plan
from weightxform.triton_common import tables
from weightxform.verify import check_case, flatten, make_args

fast_interpreter.install()
triton_entries.QUADS = tl.constexpr(
    128
)  # fewer turns of a loop: the interpreter takes as long for few numbers as for many

FORWARD, BACKWARD = OPS["subspace_fwd"], OPS["subspace_bwd"]
SHORT = {
    "one_hot-toy_tile_64", "sparse-toy_tile_64", "block_hadamard-toy_tile_64", "block_hadamard-batch",
    "rademacher-one_element", "gaussian-one_coordinate", "fastfood_global_sign-toy", "fastfood_stacked_sign-toy", "toy",
}  # fmt: skip
OTHER_DTYPES = (
    "one_hot-toy_tile_64", "block_hadamard-toy_tile_64", "rademacher-one_element", "sparse-per_tensor",
    "fastfood_global_sign-one_coordinate", "gaussian-one_coordinate", "fastfood_stacked_binomial-toy",
)  # fmt: skip


def _param(op, case, dtype, short):
    return pytest.param(op, case, dtype, id=f"{op.name}-{case}-{dtype}", marks=[] if short else pytest.mark.long)


ROOM = [op for op in OPS.values() if op.name.startswith("subspace")]
CASES = [_param(op, case, torch.float32, case in SHORT) for op in ROOM for case in op.cases]
CASES += [
    _param(op, case, dtype, dtype == torch.bfloat16 and case in (*OTHER_DTYPES[:3], "toy"))
    for op in ROOM
    for case in (("toy",) if "dense" in op.name else OTHER_DTYPES)
    for dtype in (torch.float64, torch.bfloat16, torch.float16)
]


@pytest.mark.parametrize(("op", "case", "dtype"), CASES)
def test_against_float64(op, case, dtype):
    """Two runs give the same bits; theta has those of the reference."""
    last = []

    def call(*args):
        last.append(op.triton(*args))
        return last[-1]

    result = check_case(op, case, dtype, "cpu", call)
    assert result.passed, result
    if op is FORWARD:
        for ours, theirs in zip(last[-1], op.reference(*make_args(op, case, dtype, "cpu")), strict=True):
            assert ours.stride() == theirs.stride()
            assert torch.equal(bits(ours), bits(theirs))


def bits(t):
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def test_every_op_of_the_room_has_a_kernel():
    assert all(op.triton is not None for name, op in OPS.items() if name.startswith("subspace"))


@triton.jit
def draws(out, k0, k1, at, column, step, INVERSE: tl.constexpr, BITS: tl.constexpr):
    i = tl.arange(0, 1 << BITS)
    key = k0.to(tl.uint32), k1.to(tl.uint32)
    pos = at.to(tl.int64) + i
    if BITS > 0:
        start = tl.full([], 0, tl.int64)
        w0, w1, w2, w3 = triton_random.draw(key, triton_random.PERM, start, column, step.to(tl.uint32))
        x = triton_random.permuted(i.to(tl.uint32), w0, w1, w2, w3, tl.full([], BITS, tl.uint32))
        if INVERSE:
            x = triton_random.unpermuted(x, w0, w1, w2, w3, tl.full([], BITS, tl.uint32))
        tl.store(out + i, x.to(tl.int64))
    else:
        words = triton_random.draw(key, triton_random.PERM, pos, column, step.to(tl.uint32))
        for w in tl.static_range(4):
            tl.store(out + 4 * i + w, words[w].to(tl.int64))


@triton.jit
def plain(out):
    zero = tl.full([], 0, tl.uint32)
    words = triton_random.philox4x32(zero, zero, zero, zero, zero, zero)
    for w in tl.static_range(4):
        tl.store(out + w, words[w].to(tl.int64))


def test_known_words():
    out = torch.zeros(4, dtype=torch.int64)
    plain[(1,)](out)
    assert [f"{w:08x}" for w in out.tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("at", [0, 7, 2**32 - 1, 2**40 + 5, 2**56 - 1])
def test_draws_are_those_of_the_reference(at):
    key, step = (0xDF7FA288, 0xD6A228D0), 2**32 - 2
    out = torch.zeros(4, dtype=torch.int64)
    draws[(1,)](out, *key, at, 7, step, INVERSE=False, BITS=0)
    assert torch.equal(out, philox.philox(key, philox.PERM, torch.tensor(at), 7, torch.tensor(step)))


@pytest.mark.parametrize("size", range(1, 15))
def test_permutations_and_their_inverses(size):
    key, length = (0xDF7FA288, 0xD6A228D0), 1 << size
    out = torch.zeros(length, dtype=torch.int64)
    draws[(1,)](out, *key, 0, 1, 3, INVERSE=False, BITS=size)
    expected = philox.permutation(key, philox.PERM, torch.tensor([0]), length, 1, torch.tensor(3))
    assert torch.equal(out, expected[0]) and torch.equal(out.sort()[0], torch.arange(length))
    draws[(1,)](out, *key, 0, 1, 3, INVERSE=True, BITS=size)
    assert torch.equal(out, torch.arange(length))


def own(kind, tensors, d, tile, **options):
    plan = make_plan(kind, tensors, d, 5, tile=tile, **options)
    members, firsts = list(range(len(plan.names))), [0] * len(plan.names)
    return members, firsts, plan.layout, plan.factors, None, plan


@pytest.mark.parametrize("kind", ["one_hot", "block_hadamard"])
def test_tiles_larger_than_a_program(kind):
    members, firsts, *tables, plan = own(kind, {"a": 16384 + 9000, "b": 5000}, 600, 16384)
    rest = kind, 16384, 1, plan.packed
    c = plan.columns_in(torch.float32, "cpu")
    z, theta0 = torch.randn(600), [torch.randn(n) for n in plan.sizes]
    ours = FORWARD.triton(z, c, theta0, members, firsts, *tables, *rest)
    theirs = FORWARD.reference(z, c, theta0, members, firsts, *tables, *rest)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(ours, theirs, strict=True))
    back = theta0, c, members, firsts, *tables, kind, 600, 0, *rest[1:]
    torch.testing.assert_close(BACKWARD.triton(*back), BACKWARD.reference(*back))


def test_several_chunks_for_each_sum(monkeypatch):
    monkeypatch.setattr(triton_plan, "accumulators", lambda *_: 2)
    for case in ("one_hot-net", "block_hadamard-net", "rademacher-toy"):
        result = check_case(BACKWARD, case, torch.float32, "cpu", BACKWARD.triton)
        assert result.passed, result


def test_a_table_is_made_once_for_the_same_tensors(monkeypatch):
    made = []
    finish = triton_plan.Table.finish
    monkeypatch.setattr(triton_plan.Table, "finish", lambda table: made.append(table) or finish(table))
    monkeypatch.setattr(tables, "plans", tables.Kept(4))
    args = make_args(FORWARD, "one_hot-one_element", torch.float32, "cpu")
    for _ in range(3):
        FORWARD.triton(*args)
    assert len(made) == 1
    factors = args[6] * 2
    outs = FORWARD.triton(*args[:6], factors, *args[7:])
    assert len(made) == 2
    assert torch.equal(outs[0], FORWARD.reference(*args[:6], factors, *args[7:])[0])


def test_a_capture_needs_a_table_that_is_there(monkeypatch):
    monkeypatch.setattr(tables, "plans", tables.Kept(4))
    args = make_args(FORWARD, "one_hot-one_element", torch.float32, "cpu")
    expected = flatten(FORWARD.triton(*args))
    monkeypatch.setattr(tables, "capturing", lambda device: True)
    assert all(map(torch.equal, flatten(FORWARD.triton(*args)), expected))
    with pytest.raises(RuntimeError, match=r"subspace: a CUDA graph is being captured.*run the same code once before"):
        FORWARD.triton(*make_args(FORWARD, "rademacher-one_element", torch.float32, "cpu"))


def test_arguments_that_do_not_fit():
    z, c, theta0, members, firsts, layout, factors, step, kind, tile, strata, packed = make_args(
        FORWARD, "one_hot-toy", torch.float32, "cpu"
    )
    tables = layout, factors, step

    def refused(message, *args):
        with pytest.raises(RuntimeError, match=f"subspace: {message}"):
            FORWARD.triton(*args)

    refused("kind must be one of", z, c, theta0, members, firsts, *tables, "hot", tile, strata, packed)
    refused("tile must be a power of two", z, c, theta0, members, firsts, *tables, kind, 100, strata, packed)
    refused("z must be where", z.double(), c, theta0, members, firsts, *tables, kind, tile, strata, packed)
    refused("c must be", z, c[1:], theta0, members, firsts, *tables, kind, tile, strata, packed)
    refused("tensors, members and", z, c, theta0, members[1:], firsts, *tables, kind, tile, strata, packed)
    refused("a tensor has more elements", z, c, theta0, members, [1] * 7, *tables, kind, tile, strata, packed)
    refused("tensors must have one dtype", z, c, [t.double() if i else t for i, t in enumerate(theta0)], members,
            firsts, *tables, kind, tile, strata, packed)  # fmt: skip
    refused(
        "step must be", z, c, theta0, members, firsts, layout, factors, torch.tensor(1.0), kind, tile, strata, packed
    )


def test_the_backend_serves_the_op():
    args = make_args(FORWARD, "one_hot-one_element", torch.float32, "cpu")
    with wx.backend("triton"):
        assert torch.equal(FORWARD(*args)[0], FORWARD.reference(*args)[0])
