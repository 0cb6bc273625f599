"""The ways to compute the filters of a case: ours, and the baselines by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import weightxform as wx

from .... import backends
from ...case import Variant
from . import plain
from .problem import FEATURES, KINDS, RANK, UNITS, FilterProblem, Form, raws

OPS = {"modulate": "modulate_fwd", "demodulate": "modulate_fwd", "filter_mlp": "filter_mlp_fwd"}  # others: filter_warp
GEMMS = "low_rank", "affine_hypernet"  # products of torch's, in both
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


def _attached(problem: FilterProblem, make: Callable[[], wx.FilterTransform], paths: dict[str, str]) -> Built:
    """A transform whose parameters are those of the problem. ``paths``: name of a tensor -> of the parameter."""
    leaves, transform = problem.leaves(), make()
    transform.attach(leaves["weight"])
    transform.to(problem.device)
    for name, path in paths.items():
        owner, _, last = path.rpartition(".")
        leaves[name] = nn.Parameter(leaves[name].detach())
        setattr(transform.get_submodule(owner), last, leaves[name])
    weight, conditions = leaves["weight"], {"params": leaves["params"]}
    return lambda: [transform.whole(weight, conditions)], raws(leaves)


_FEATURES: dict[str, Any] = {"condition": "params", "size": FEATURES, "harmonics": None}
ATTACHED: dict[str, tuple[Callable[[], wx.FilterTransform], dict[str, str]]] = {
    "steerable": (lambda: wx.Steerable(condition="params"), {}),
    "flip": (lambda: wx.Flip(-1, "params"), {}),
    "permute": (lambda: wx.Permute("p4", "params"), {}),
    "low_rank": (
        lambda: wx.LowRank(RANK, **_FEATURES), {"u": "U", "v": "V", "gain": "g.last.weight", "bias": "g.last.bias"},
    ),
    "affine_hypernet": (lambda: wx.AffineHypernet(UNITS, **_FEATURES), {"rows": "H", "w1": "w1", "b1": "b1"}),
}  # fmt: skip
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
    "formula": ("torch, its formula", FORMULAS),
}
COMPILED = " compiled"


def build(problem: FilterProblem, form: Form, compiled: bool = False) -> Built:
    leaves = problem.leaves()
    function = torch.compile(form, dynamic=False, fullgraph=True) if compiled else form
    return lambda: [function(**leaves)], raws(leaves)


def variants(problem: FilterProblem) -> Iterator[Variant]:
    kind = problem.case.kind
    served, _ = backends.serving(OPS.get(kind, "filter_warp_fwd"), problem.device.type)
    ours = partial(_attached, problem, *ATTACHED[kind]) if kind in ATTACHED else partial(build, problem, OURS[kind])
    yield Variant("ours", "ours", ours, "torch" if kind in GEMMS else served)
    for chosen in problem.case.plain:
        name, forms = NAMED[chosen.removesuffix(COMPILED)]
        form = forms[kind]
        if chosen.endswith(COMPILED):
            compiled = name.replace("torch", "torch.compile", 1)
            yield Variant(compiled, "compiled", partial(build, problem, form, True), "inductor")
        else:
            yield Variant(name, "eager", partial(build, problem, form), "torch")
