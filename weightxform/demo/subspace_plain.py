"""The wrapper of the question "train a model in an affine subspace", in plain torch: as asked, and made to work."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import weightxform as wx


class PlainSubspace(nn.Module):
    """theta = E z + theta0, split into the shapes of the parameters, run by ``functional_call``.

    Args:
        model: its parameters are frozen.
        basis: E, [D, d].
    """

    def __init__(self, model: nn.Module, basis: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.basis = basis
        self.theta0 = parameters_to_vector(model.parameters())
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        self.z = nn.Parameter(torch.zeros(basis.shape[1], dtype=basis.dtype))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.basis @ self.z + self.theta0
        parts = theta.split([shape.numel() for shape in self.shapes.values()])
        weights = {name: part.view(s) for (name, s), part in zip(self.shapes.items(), parts, strict=True)}
        return torch.func.functional_call(self.model, weights, (x,))


def gradient_as_asked(model: nn.Module, basis: Tensor, loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """The gradient of z where ``vector_to_parameters`` writes the weights.

    It assigns ``param.data``: values without their history. ``backward`` runs, into the parameters, and z gets nothing.
    """
    z = nn.Parameter(torch.zeros(basis.shape[1], dtype=basis.dtype))
    theta0 = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(basis @ z + theta0, model.parameters())
    loss(model(x)).backward()
    return z.grad


@torch.no_grad()
def explicit(model: nn.Module, dim: int, projection: str, seed: int, block: int = 64) -> Tensor:
    """P itself, [D, dim], in the dtype of the model: its columns are the weights at theta0 = 0, z = e_k."""
    for p in model.parameters():
        p.zero_()
    sub = wx.Subspace(model, dim, projection, seed)
    read = [attrgetter(name) for name in sub.names]
    total = sum(get(model).numel() for get in read)
    dtype = read[0](model).dtype
    basis = torch.empty(total, dim, dtype=dtype)
    rows = torch.empty(min(block, dim), total, dtype=dtype)
    for first in range(0, dim, block):
        count = min(block, dim - first)
        for k in range(count):
            sub.coordinates.zero_()[first + k] = 1
            torch.cat([get(model).flatten() for get in read], out=rows[k])
        basis[:, first : first + count] = rows[:count].T
    return basis
