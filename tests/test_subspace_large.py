"""Large tensors: several threads, and a shard at a time positions and windows beyond 32 bits."""

from __future__ import annotations

import pytest
import subspace_oracle as oracle
import torch
from subspace_models import implicit
from torch.testing import assert_close

import weightxform as wx
from weightxform import backends
from weightxform.subspace.op import subspace_bwd, subspace_fwd

KEY = (0x1234ABCD, 0xFEDC9876)
BACKENDS = [name for name in backends.available("subspace_fwd") if name in ("cpu", "reference")]
D = 2**56 - 5


def rows(kind: str, first: int, count: int, d: int, tile: int, packed: bool, g: int) -> torch.Tensor:
    """Rows of P without its scales. ``first`` and the elements after it lie in one whole tile."""
    P = torch.zeros(count, d, dtype=torch.float64)
    start = first - first % tile
    o = oracle.window(KEY, start, g, d, tile, packed)
    for k, i in enumerate(range(first, first + count)):
        j = i - start
        if kind == "rademacher":
            P[k] = torch.tensor([oracle.sign(KEY, oracle.ENTRY, i, c) for c in range(d)])
        elif kind == "gaussian":
            P[k] = torch.tensor([oracle.coin(KEY, oracle.ENTRY, i, c, 0) for c in range(d)])
        elif kind == "one_hot":
            P[k, (o + oracle.bijection(KEY, oracle.PERM, start, tile, j)) % d] = oracle.sign(KEY, oracle.SIGN_IN, i)
        else:
            for v in range(tile):
                entry = oracle.sign(KEY, oracle.SIGN_IN, start + v) * oracle.sign(KEY, oracle.SIGN_OUT, i)
                P[k, (o + v) % d] += entry * (-1) ** (j & v).bit_count() / tile**0.5
    return P


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("first", [2**31 - 64, 2**32 + 64 * 77 + 11, 2**55 + 64 * 12345 + 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("kind", "d"), [("one_hot", 1009), ("block_hadamard", 1009), ("rademacher", 7), ("gaussian", 5)]
)
def test_rows_far_out(kind, d, packed, first, backend):
    tile, count, start = 64, 40, 2**54 + 321
    layout = torch.tensor([[D, start, *KEY]])
    factors = torch.ones(1, dtype=torch.float64)
    z, g = torch.randn(d, dtype=torch.float64), torch.randn(count, dtype=torch.float64)
    tables = layout, factors, None, kind
    with wx.backend(backend):
        zeros = torch.zeros(count, dtype=torch.float64)
        (theta,) = subspace_fwd(z, None, [zeros], [0], [first], *tables, tile, 1, packed)
        z_bar = subspace_bwd([g], None, [0], [first], *tables, d, 0, tile, 1, packed)
    P = rows(kind, first, count, d, tile, packed, start)
    assert_close(theta, P @ z, rtol=1e-12, atol=1e-12)
    assert_close(z_bar, P.T @ g, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["block_hadamard", "one_hot", "sparse"])
def test_same_bits_for_any_number_of_threads(kind):
    sizes = {"a": 200_003, "b": 150_001, "c": 7}
    p = implicit(kind, sizes, 1000)
    z, weights = torch.randn(1000), [torch.randn(n) for n in sizes.values()]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([*p.project(z, weights, range(3)), p.adjoint(weights, range(3))])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
