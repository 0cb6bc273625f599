"""How wx.Conditioned puts the samples of a batch in the order of their conditions, and which form it takes."""

from __future__ import annotations

import pytest
import torch
from conditioned_small import F64
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import weightxform as wx
from weightxform.conditioned import forms
from weightxform.conditioned.condition import Given

ORDER = torch.tensor([2, 0, 3, 1])
BACK = ORDER.argsort()


def permuted(x: torch.Tensor) -> torch.Tensor:
    return forms._permuted(x, ORDER, BACK)


def test_derivatives_of_a_permutation() -> None:
    x = torch.randn(4, 3, dtype=F64, requires_grad=True)
    assert torch.equal(permuted(x), x[ORDER])
    assert gradcheck(permuted, x, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(lambda x: permuted(x).sin(), x)
    with forward_ad.dual_level():
        dual = permuted(forward_ad.make_dual(x.detach(), x.detach() * 2))
        assert torch.equal(forward_ad.unpack_dual(dual).tangent, 2 * x.detach()[ORDER])


def test_function_transforms_of_a_permutation() -> None:
    x, v = torch.randn(5, 4, 3, dtype=F64), torch.randn(4, 3, dtype=F64)
    assert torch.equal(torch.vmap(permuted)(x), x[:, ORDER])
    for inner in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(inner(permuted)(v), inner(lambda v: v[ORDER])(v))
    assert torch.equal(permuted(torch.arange(4)), ORDER)


@pytest.mark.parametrize(("count", "side", "form"), [(2, 6, "loop"), (8, 6, "grouped"), (2, 32, "grouped")])
def test_the_form_follows_the_shape_and_the_number_of_conditions(count: int, side: int, form: str) -> None:
    """A loop makes a convolution for each condition, the groups a copy of the weight for each sample."""
    index = torch.arange(16) % count
    given = Given({"angle": torch.rand(count)}, count, index, 16)
    x = torch.zeros(16, 8, side, side)
    assert forms.best(nn.Conv2d(8, 8, 3), wx.Rotate(), x, given) == form
    own = Given({"angle": torch.rand(16)}, 16, None, 16)
    assert forms.best(nn.Conv2d(8, 8, 3), wx.Rotate(), x, own) == "grouped"
