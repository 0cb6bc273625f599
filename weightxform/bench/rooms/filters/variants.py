"""The ways to compute the filters of a case: ours, and the baselines by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

import weightxform as wx

from .... import backends
from ...case import Variant
from . import plain
from .problem import KINDS, FilterProblem, Form, raws

OPS = {"modulate": "modulate_fwd", "demodulate": "modulate_fwd", "filter_mlp": "filter_mlp_fwd"}  # others: filter_warp
Built = tuple[Callable[[], Sequence[Tensor]], list[Tensor]]


def _turned(weight: Tensor, params: Tensor, padding: str = "zeros") -> Tensor:
    matrix = wx.functional.rotation_matrix(params, (weight.shape[-2], weight.shape[-1]), padding=padding)  # type: ignore[arg-type]
    return wx.functional.filter_warp(weight, matrix)


def _by_affine(theta: Callable[[Tensor], Tensor], weight: Tensor, params: Tensor) -> Tensor:
    matrix = wx.functional.affine_matrix(theta(params), (weight.shape[-2], weight.shape[-1]))
    return wx.functional.filter_warp(weight, matrix)


def _routed(weight: Tensor, routing: Tensor) -> Tensor:
    """A weight is a filter of one tap, and r_e the matrix of its bank."""
    banks = weight.view(*weight.shape[:2], -1, 1)
    return wx.functional.filter_warp(banks, routing[:, :, None, None]).view(-1, *weight.shape[1:])


OURS: dict[str, Form] = {
    "rotate": _turned,
    "rotate_border": partial(_turned, padding="border"),
    "scale": partial(_by_affine, plain.scaling),
    "shear": partial(_by_affine, plain.shearing),
    "affine": partial(_by_affine, lambda theta: theta),
    "learned": lambda weight, matrix: wx.functional.filter_warp(weight, matrix),
    "filter_mlp": wx.functional.filter_mlp,
    "modulate": lambda weight, style: wx.functional.modulate(weight, style, demodulate=False),
    "demodulate": lambda weight, style: wx.functional.modulate(weight, style, eps=plain.EPS),
    "experts": _routed,
}


def _grid(theta: Callable[[Tensor], Tensor], padding: str = "zeros") -> Form:
    return lambda weight, params: plain.grid_sample(weight, theta(params), padding)


# name in a case: (name in the tables, kind -> form)
GRID, MATMUL, ARC = "torch, grid_sample", "torch, A @ w", "torch, ARC's closed form"
STYLEGAN, MLP = "torch, StyleGAN2", "torch, cat + MLP"
GRIDS: dict[str, Form] = {
    "rotate": _grid(plain.rotation),
    "rotate_border": _grid(plain.rotation, "border"),
    "scale": _grid(plain.scaling),
    "shear": _grid(plain.shearing),
    "affine": _grid(lambda theta: theta),
}
FORMULAS = {kind: found.form for kind, found in KINDS.items()}
NAMED: dict[str, tuple[str, dict[str, Form]]] = {
    "grid_sample": (GRID, GRIDS),
    "matmul": (MATMUL, FORMULAS),
    "arc": (ARC, {"rotate_border": lambda weight, params: plain.arc(weight, params)}),
    "stylegan2": (STYLEGAN, FORMULAS),
    "mlp": (MLP, FORMULAS),
    "mix": ("torch, r @ W", FORMULAS),
}
COMPILED = " compiled"


def build(problem: FilterProblem, form: Form, compiled: bool = False) -> Built:
    leaves = problem.leaves()
    function = torch.compile(form, dynamic=False, fullgraph=True) if compiled else form
    return lambda: [function(**leaves)], raws(leaves)


def variants(problem: FilterProblem) -> Iterator[Variant]:
    kind = problem.case.kind
    served, _ = backends.serving(OPS.get(kind, "filter_warp_fwd"), problem.device.type)
    yield Variant("ours", "ours", partial(build, problem, OURS[kind]), served)
    for chosen in problem.case.plain:
        name, forms = NAMED[chosen.removesuffix(COMPILED)]
        form = forms[kind]
        if chosen.endswith(COMPILED):
            compiled = name.replace("torch", "torch.compile", 1)
            yield Variant(compiled, "compiled", partial(build, problem, form, True), "inductor")
        else:
            yield Variant(name, "eager", partial(build, problem, form), "torch")
