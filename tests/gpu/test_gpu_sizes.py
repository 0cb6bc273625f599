"""Empty, very many and very large weights: indices of more than 32 bits, tables of more than one launch can take."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, SHAPES, anywhere, assert_near, list_inputs, run_list, run_single
from torch import Tensor

from weightxform.numerics import relative_error
from weightxform.registry import OPS
from weightxform.spectral_norm import reference

COLUMNS = 32771  # prime
CHUNK = 1024  # rows


def rows_for(elements: int, tensors: int) -> int:
    """Rows of a bfloat16 weight of just over so many elements; fewer where ``tensors`` of its size do not fit."""
    if DEVICE.type == "cpu":
        return 3 * CHUNK // 2
    torch.cuda.empty_cache()  # of the test before
    free, _ = torch.cuda.mem_get_info()
    fit = int(0.8 * free) // (2 * tensors * COLUMNS) - 8 * CHUNK  # pieces in float64 besides
    return min(elements // COLUMNS + 5, max(fit, CHUNK))


def fill(rows: int, seed: int) -> Tensor:
    return torch.randn(
        rows, COLUMNS, dtype=torch.bfloat16, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)
    )


def chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(t.split(CHUNK) for t in tensors), strict=True))


def times(weight: Tensor, v: Tensor) -> Tensor:
    return torch.cat([w.double() @ v for (w,) in chunks(weight)])


def transposed_times(weight: Tensor, u: Tensor) -> Tensor:
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=DEVICE)
    for w, part in chunks(weight, u):
        total += w.double().T @ part
    return total


def exact_state(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration, u first, in float64 and in pieces."""
    forward, back = (times, transposed_times) if dim == 0 else (transposed_times, times)
    u = reference.unit(forward(weight, v.double()), 1e-12)
    v = reference.unit(back(weight, u), 1e-12)
    return u, v, u @ forward(weight, v)


def check_pieces(actual: Tensor, exact: list[Tensor]) -> None:
    """Each piece of rows by itself, so that a wrong tail is not lost in the norm of the whole."""
    for (piece,), e in zip(chunks(actual), exact, strict=True):
        error = float(torch.linalg.vector_norm(piece.double() - e) / torch.linalg.vector_norm(e))
        assert error <= torch.finfo(actual.dtype).eps, error


def check_weight(weight: Tensor, dout: Tensor, found: tuple, dim: int) -> None:
    """``found``: (out, state, dweight)."""
    out, state, dweight = found
    h, w = reference.matrix_shape(weight, dim)
    u, v = (torch.ones(n, device=DEVICE) / n**0.5 for n in (h, w))
    u, v, sigma = exact_state(weight, u, v, dim)
    assert_near(state[:h], u)
    assert_near(state[h : h + w], v)
    assert_near(state[h + w :], sigma.reshape(1))
    check_pieces(out, [w.double() / sigma for (w,) in chunks(weight)])
    dot = sum((d.double() * w.double()).sum() for d, w in chunks(dout, weight)) / sigma**2
    rows, columns = (u, v) if dim == 0 else (v, u)
    check_pieces(dweight, [d.double() / sigma - dot * part.outer(columns) for d, part in chunks(dout, rows)])


@anywhere
@pytest.mark.parametrize("dim", [0, 1])
def test_more_elements_than_32_bits_count(dim):
    rows = rows_for(2**31, tensors=4)
    weight, dout = fill(rows, 0), fill(rows, 1)
    dout += weight
    h, w = reference.matrix_shape(weight, dim)
    u, v = (torch.ones(n, device=DEVICE) / n**0.5 for n in (h, w))
    out, state = OPS["spectral_norm_fwd"](weight, u, v, None, dim, 1, 1e-12, False, None, None)
    dweight, _ = OPS["spectral_norm_bwd"](dout, weight, state, None, dim, None)
    check_weight(weight, dout, (out, state, dweight), dim)


@anywhere
def test_a_list_of_more_elements_than_32_bits_count():
    rows = rows_for(2**31 // 3, tensors=12)
    weights, douts = [fill(rows, i) for i in range(3)], [fill(rows, 10 + i) for i in range(3)]
    for dout, weight in zip(douts, weights, strict=True):
        dout += weight
    us, vs = ([torch.ones(n, device=DEVICE) / n**0.5] * 3 for n in (rows, COLUMNS))
    outs, state = OPS["spectral_norm_fwd_list"](weights, us, vs, [], [0] * 3, [1] * 3, 1e-12, False, None, None)
    size = rows + COLUMNS + 1
    offsets = [i * size for i in range(3)]
    dweights, _ = OPS["spectral_norm_bwd_list"](douts, weights, state, offsets, [], [0] * 3, None)
    for i in range(3):
        found = outs[i], state[offsets[i] : offsets[i] + size], dweights[i]
        check_weight(weights[i], douts[i], found, 0)


@anywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_very_many_members(dtype):
    shapes = [(1 + i % 7, 1 + i % 11) for i in range(3000)] + [*SHAPES, (0, 4), (4, 0)]
    inputs = list_inputs(shapes, dtype)
    found = run_list(inputs)
    again = run_single(inputs)  # out, u, v, sigma, gradient of each
    n = len(shapes)
    assert len(found) == 2 * n + 1 and len(again) == 5 * n
    state = torch.cat([x.reshape(-1) for i in range(n) for x in again[5 * i + 1 : 5 * i + 4]])
    assert_near(found[n], state.double())
    for i in range(n):
        for mine, theirs in ((found[i], again[5 * i]), (found[n + 1 + i], again[5 * i + 4])):
            # The gradient of a weight of one element or one row may vanish: compared with what was upstream.
            error = relative_error(mine, theirs.double())
            small = float((mine.double() - theirs.double()).norm()) <= 1e-5 * float(inputs["douts"][i].double().norm())
            assert small or error <= 2 * torch.finfo(dtype).eps, (shapes[i], error)


@anywhere
def test_empty_members_alone():
    inputs = list_inputs([(0, 5), (5, 0), (0, 0)])
    outputs = run_list(inputs)
    assert [tuple(t.shape) for t in outputs[:3]] == [(0, 5), (5, 0), (0, 0)]
    state = outputs[3]
    expected = [x for u, v in zip(inputs["us"], inputs["vs"], strict=True) for x in (u, v, u.new_zeros(1))]
    assert torch.equal(state, torch.cat(expected))
