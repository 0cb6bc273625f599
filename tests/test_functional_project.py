"""``wx.functional.project``: theta0 + P z for named tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightxform as wx
from weightxform.functional import project


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 3, 2, 2), "b.bias": (4,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("projection", ["block_hadamard", "one_hot", "gaussian", "fastfood", "kronecker"])
def test_gives_the_weights_of_a_subspace(projection):
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    theta0 = {name: p.detach().clone() for name, p in net.named_parameters()}
    sub = wx.Subspace(net, 9, projection, seed=4)
    z = torch.randn(9)
    with torch.no_grad():
        sub.coordinates.copy_(z)
    found = project(z, theta0, projection=projection, seed=4)
    assert list(found) == list(theta0)
    for name, theta in found.items():
        layer, attribute = name.split(".")
        assert torch.equal(theta, getattr(net[int(layer)], attribute)), name


def test_derivatives():
    theta0 = tensors()
    z = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight = theta0["a.weight"].clone().requires_grad_()

    def f(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(project(z, {**theta0, "a.weight": weight}).values())

    assert torch.autograd.gradcheck(f, (z, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (z, weight))


def test_many_coordinates_share_one_call():
    theta0, z = tensors(torch.float32), torch.randn(3, 7)
    together = project(z, theta0)
    mapped = torch.vmap(lambda row: project(row, theta0))(z)
    for k in range(3):
        alone = project(z[k], theta0)
        for name in theta0:
            assert torch.equal(together[name][k], alone[name])
            assert torch.equal(mapped[name][k], alone[name])


def test_dtypes_may_differ():
    theta0 = tensors(torch.float32)
    theta0["a.weight"] = theta0["a.weight"].to(torch.bfloat16)
    theta0["b.bias"] = theta0["b.bias"].double()
    z = torch.randn(7, requires_grad=True)
    found = project(z, theta0)
    assert [t.dtype for t in found.values()] == [t.dtype for t in theta0.values()]
    sum(t.double().square().sum() for t in found.values()).backward()
    assert z.grad is not None and z.grad.dtype == torch.float32 and bool(z.grad.abs().gt(0).any())


def test_steps_take_other_projections():
    theta0, z = tensors(), torch.randn(7, dtype=torch.float64)
    first = project(z, theta0, step=torch.tensor(0))
    other = project(z, theta0, step=torch.tensor(1))
    for name, t in project(z, theta0).items():
        assert torch.equal(t, first[name])
    assert not torch.allclose(first["a.weight"], other["a.weight"])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "z must be", {"z": 3}),
        (ValueError, r"z must be float64 or float32 \[d\]", {"z": torch.zeros(2, 2, 2)}),
        (ValueError, "z must be float64 or float32", {"z": torch.zeros(3, dtype=torch.float16)}),
        (TypeError, "theta0 must be a mapping", {"theta0": []}),
        (TypeError, r"theta0\['a'\] must be float64", {"theta0": {"a": torch.arange(3)}}),
        (ValueError, r"theta0\['a'\] must be on cpu", {"theta0": {"a": torch.zeros(3, device="meta")}}),
        (ValueError, "dim must be from 1 to 3", {"theta0": {"a": torch.zeros(3)}}),
        (ValueError, "projection must be one of", {"projection": "dct"}),
        (ValueError, "normalize must be", {"normalize": "none"}),
        (ValueError, "normalize must be 'global'", {"normalize": "init", "projection": "kronecker"}),
        (ValueError, "step must be None or an int64 scalar", {"step": torch.tensor(1.0)}),
        (TypeError, "seed must be an int", {"seed": 1.5}),
    ],
)
def test_bad_arguments(error, message, arguments):
    given = {"z": torch.zeros(7), "theta0": tensors(torch.float32), **arguments}
    with pytest.raises(error, match=message):
        project(given.pop("z"), given.pop("theta0"), **given)
