"""The cases: one filter bank made for C conditions, or a model that is given them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...case import Case, Problem
from . import plain

Tensors = dict[str, Tensor]
Form = Callable[..., Tensor]

HIDDEN, EXPERTS = 64, 4
FEATURES, RANK, UNITS = 4, 4, 8
WITHIN = math.radians(40)  # ARC's router keeps its angles there


@dataclass(frozen=True)
class Kind:
    """A transform.

    Attributes:
        form: what is right: the formula in plain torch, of the tensors of ``shapes`` by name, and ``weight``.
        each: name -> shape of one condition; drawn by ``draw``.
        shared: name -> shape, of a weight [O, I, *k]; normal, over the root of their last axis.
        banks: E, of a weight [E, O, I, *k].
        fixed: the conditions are whole numbers, and take no gradient.
        change: what becomes of the numbers that were drawn.
    """

    form: Form
    each: Callable[[Sequence[int]], dict[str, tuple[int, ...]]]
    draw: Callable[..., Tensor] = torch.randn
    shared: Callable[[Sequence[int]], dict[str, tuple[int, ...]]] = lambda weight: {}
    banks: int | None = None
    fixed: bool = False
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors


def _taps(weight: Sequence[int]) -> int:
    return math.prod(weight[2:])


def _between(low: float, high: float, *shape: int) -> Tensor:
    return torch.rand(*shape) * (high - low) + low


def _affine(*shape: int) -> Tensor:
    return torch.tensor([[1.0, 0, 0], [0, 1, 0]]) + _between(-0.4, 0.4, *shape)


def _warp(theta: Callable[[Tensor], Tensor], padding: str) -> Form:
    def form(weight: Tensor, params: Tensor) -> Tensor:
        return plain.matmul(weight, plain.warp_matrix(theta(params), weight.shape[-1], padding))

    return form


def _mlp_shapes(weight: Sequence[int]) -> dict[str, tuple[int, ...]]:
    taps = _taps(weight)
    return {"w1": (HIDDEN, taps + 2), "b1": (HIDDEN,), "w2": (taps, HIDDEN), "b2": (taps,)}


def _low_rank_shapes(weight: Sequence[int]) -> dict[str, tuple[int, ...]]:
    columns = math.prod(weight[1:])
    return {"u": (weight[0], RANK), "v": (RANK, columns), "gain": (RANK, FEATURES), "bias": (RANK,)}


def _hypernet_shapes(weight: Sequence[int]) -> dict[str, tuple[int, ...]]:
    return {"rows": (UNITS, math.prod(weight)), "w1": (UNITS, FEATURES), "b1": (UNITS,)}


def _off_the_kink(tensors: Tensors) -> Tensors:
    """Numbers of few bits: every hidden unit is computed without a rounding, and is at least 2^-12 from the kink of its
    relu, also where all are three quarters of what they were. Else a rounding would decide which gradient is right."""
    coarse = {n: (8 * torch.randn_like(t) if n == "weight" else 8 * t).round() / 8 for n, t in tensors.items()}
    return tensors | coarse | {"b1": coarse["b1"] + 2**-10}


TURN: dict[str, tuple[int, ...]] = {"params": ()}
KINDS = {
    "rotate": Kind(_warp(plain.rotation, "zeros"), lambda w: TURN, partial(_between, -math.pi, math.pi)),
    "rotate_border": Kind(_warp(plain.rotation, "border"), lambda w: TURN, partial(_between, -WITHIN, WITHIN)),
    "scale": Kind(_warp(plain.scaling, "zeros"), lambda w: {"params": (2,)}, partial(_between, 0.6, 1.6)),
    "shear": Kind(_warp(plain.shearing, "zeros"), lambda w: {"params": (2,)}, partial(_between, -0.5, 0.5)),
    "affine": Kind(_warp(lambda theta: theta, "zeros"), lambda w: {"params": (2, 3)}, _affine),
    "learned": Kind(plain.matmul, lambda w: {"matrix": (_taps(w), _taps(w))}),
    "filter_mlp": Kind(plain.filter_mlp, lambda w: {"condition": (2,)}, shared=_mlp_shapes, change=_off_the_kink),
    "modulate": Kind(plain.modulated, lambda w: {"style": (w[1],)}),
    "demodulate": Kind(plain.demodulated, lambda w: {"style": (w[1],)}),
    "steerable": Kind(plain.steered, lambda w: TURN, partial(_between, -math.pi, math.pi)),
    "flip": Kind(plain.flipped, lambda w: TURN, partial(_between, 0.0, 1.0)),
    "permute": Kind(plain.quarters, lambda w: TURN, lambda *shape: torch.randint(4, shape).float(), fixed=True),
    "low_rank": Kind(plain.low_rank, lambda w: {"params": (FEATURES,)}, shared=_low_rank_shapes),
    "affine_hypernet": Kind(plain.affine_hypernet, lambda w: {"params": (FEATURES,)}, shared=_hypernet_shapes),
    "experts": Kind(plain.experts, lambda w: {"routing": (EXPERTS,)}, banks=EXPERTS),
}


@dataclass(frozen=True)
class FilterCase(Case):
    """``count``: C, all different; ``frozen``: no gradient for the base; ``plain``: baselines, the main one first."""

    kind: str = "rotate"
    shape: tuple[int, ...] = (1, 1, 3, 3)
    count: int = 1
    frozen: bool = False
    plain: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Bytes, roughly: results, their gradients and what is right, a few times over, and hidden layers."""
        out = 4 * self.count * math.prod(self.shape)
        return out * (24 if self.kind != "filter_mlp" else 24 + 6 * HIDDEN // _taps(self.shape))


def _bank(shape: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(shape[1], shape[0], shape[2], bias=False))


def case(
    kind: str, out: int, into: int, k: int, count: int, *plain: str, frozen: bool = False, quick: bool = False
) -> FilterCase:
    """``plain``: the baselines, by their names in ``variants.py``."""
    shape = (out, into, k, k)
    name = f"{kind}-{out}x{into}x{k}x{k}-C{count}" + "-frozen" * frozen
    return FilterCase(
        name, "filters", partial(_bank, shape), None, quick,
        kind=kind, shape=shape, count=count, frozen=frozen, plain=plain,
    )  # fmt: skip


@dataclass
class FilterProblem(Problem):
    """``tensors``: name -> what the transform takes, ``weight`` the first; ``each``: the names of the conditions."""

    case: FilterCase
    tensors: Tensors = field(init=False)
    each: set[str] = field(init=False)

    def __post_init__(self) -> None:
        c, kind = self.case, KINDS[self.case.kind]
        torch.manual_seed(self.seed)
        self.model = c.model().to(self.device).train()
        weight = next(self.model.parameters()).detach()
        if kind.banks is not None:
            weight = torch.stack([weight, *(self.randn(*c.shape) * weight.std() for _ in range(kind.banks - 1))])
        each = kind.each(c.shape)
        self.each = set(each)
        self.tensors = {"weight": weight}
        self.tensors |= {name: kind.draw(c.count, *shape).to(self.device) for name, shape in each.items()}
        self.tensors |= {n: self.randn(*s) / s[-1] ** 0.5 for n, s in kind.shared(c.shape).items()}
        self.tensors = kind.change(self.tensors)
        weight = self.tensors["weight"]
        self.weights = [weight]
        # Along the weight as much as across it, so that what demodulation projects out is not all that there is.
        noise, base = self.randn(c.count, *c.shape), weight if kind.banks is None else weight[0]
        self.douts = [noise.add_(base * float(noise[0].norm() / base.norm()))]

    def leaves(self) -> Tensors:
        """Fresh; the base gets no gradient where it is frozen."""
        frozen = {"weight"} if self.case.frozen else set()
        frozen |= self.each if KINDS[self.case.kind].fixed else set()
        return {n: t.clone().requires_grad_(n not in frozen) for n, t in self.tensors.items()}

    def answer(self, factor: float, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """(results, gradients of the leaves that get one), times ``factor``, by the formula; in float64 for a condition
        at a time, which takes less memory."""
        form = KINDS[self.case.kind].form
        leaves = scaled(self.leaves(), factor, dtype)
        outs, step = [], 1 if dtype == torch.float64 else self.case.count
        for k in range(0, self.case.count, step):
            out = form(**{n: t[k : k + step] if n in self.each else t for n, t in leaves.items()})
            out.backward(self.douts[0][k : k + step].to(dtype))
            outs.append(out.detach())
        return [torch.cat(outs)], [t.grad for t in raws(leaves)]  # type: ignore[misc]


def raws(leaves: Tensors) -> list[Tensor]:
    return [t for t in leaves.values() if t.requires_grad]


def scaled(leaves: Tensors, factor: float, dtype: torch.dtype) -> Tensors:
    """Those that get a gradient times ``factor``; all in ``dtype``."""
    return {
        n: (t.detach() * (factor if t.requires_grad else 1)).to(dtype).requires_grad_(t.requires_grad)
        for n, t in leaves.items()
    }


def floor(problem: FilterProblem) -> tuple[int, int]:
    """C filter banks are written, and their gradients read; all else is read in both, its gradients are written."""
    read = sum(t.nbytes for t in problem.tensors.values())
    written = sum(t.nbytes for t in raws(problem.leaves()))
    out = problem.douts[0].nbytes
    return read + out, out + read + written
