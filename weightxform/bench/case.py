"""What a room gives the benchmark: its cases, its oracle and the variants to time."""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backends import backend
from . import rooms
from .summary import Verdict

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Case:
    """A model, all of whose Linear and Conv weights are computed.

    Attributes:
        group: ``"single"`` (one weight), ``"list"``, ``"layer"`` (one weight, for its training step), ``"subspace"``,
            ``"filters"``.
        inputs: shape of a batch, for the whole training step; ``None``: the weights alone are timed.
        quick: part of ``--quick``.
    """

    name: str
    group: str
    model: Callable[[], nn.Module]
    inputs: tuple[int, ...] | None = None
    quick: bool = False


@dataclass
class Problem:
    """A case on a device: plain weights, upstream gradients, and random numbers that are the same each time."""

    case: Case
    device: torch.device
    seed: int = 0
    model: nn.Module = field(init=False)
    weights: list[Tensor] = field(init=False)
    douts: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.case.model().to(self.device).train()
        self.weights = [layer.weight.detach() for layer in layers(self.model)]
        # Along the weight as much as across it: a wrong u, v or sigma must not be lost in the noise of a large matrix.
        self.douts = []
        for w in self.weights:
            noise = self.randn(*w.shape)
            self.douts.append(noise + w * (noise.norm() / w.norm()))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.device)

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights)

    def copy_layers(self) -> nn.ModuleList:
        """Fresh copies of the layers, with weights of their own."""
        return nn.ModuleList(copy.deepcopy(layer) for layer in layers(self.model))


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, LAYERS)]


@dataclass
class Variant:
    """One way to compute the weights of a problem.

    Attributes:
        role: ``"ours"``, ``"eager"`` or ``"compiled"``; the last two are the baselines.
        build: makes, in the problem's initial state, ``(forward, raws)``: ``forward()`` computes every weight, as one
            training step reads them, and returns them in order; ``raws`` are the leaves that get the gradients.
        backend: which kernel serves it.
        main: the one of its role that the summary speaks of. Of the compiled ones the fastest counts.
        forced: run under ``wx.backend(forced)``.
        steps: also timed in a training step, where its room has an optimizer.
    """

    name: str
    role: str
    build: Callable[[], tuple[Callable[[], Sequence[Tensor]], list[Tensor]]]
    backend: str
    main: bool = True
    forced: str | None = None
    steps: bool = True
    raws: list[Tensor] = field(init=False)
    _forward: Callable[[], Sequence[Tensor]] = field(init=False)

    def start(self) -> None:
        self._forward, self.raws = self.build()

    def fresh(self) -> None:
        """As after an optimizer step: every raw tensor was written (no element of it was), no gradient is left."""
        with torch.no_grad():
            for raw in self.raws:
                raw.grad = None
                raw[:0].zero_()

    def forward(self) -> Sequence[Tensor]:
        if self.forced is None:
            return self._forward()
        with backend(self.forced):
            return self._forward()

    def backward(self, outs: Sequence[Tensor], douts: Sequence[Tensor]) -> None:
        """Give the raw tensors their gradients."""
        torch.autograd.backward(outs, douts)

    def forward_backward(self, douts: Sequence[Tensor]) -> None:
        if self.forced is None:
            self.backward(self._forward(), douts)
            return
        with backend(self.forced):
            self.backward(self._forward(), douts)


@dataclass(frozen=True)
class Answer:
    """Errors of a variant's weights and gradients against float64, each over its own bound (1 is the limit)."""

    value: float
    gradient: float

    @property
    def passed(self) -> bool:
        return self.value <= 1 and self.gradient <= 1

    @property
    def reason(self) -> str:
        wrong = [w for w, e in (("values", self.value), ("gradients", self.gradient)) if not e <= 1]
        return f"wrong {' and '.join(wrong)}" if wrong else ""


class Judge(Protocol):
    def check(self, variant: Variant, douts: Sequence[Tensor]) -> Answer:
        """Run ``variant``, which is in the problem's initial state, and leave it fit to be timed."""
        ...


@dataclass(frozen=True)
class Room:
    """A transform as the benchmark sees it.

    Attributes:
        ops: names in the registry, whose cases are part of the gate.
        variants: the ways to compute the weights; those of role ``"ours"`` must be right, or nothing is timed.
        judge: knows what is right for a problem: ``gate.Oracle``, or a judge of the room's own.
        floor: bytes of (forward, backward) with each input read once and each output written once.
        verdicts: the figures of the room's cases, measured on this type of device, against the targets.
        problem: makes the problem of a case.
        concerns: whether a case of the ops, by name, is about what a case of the benchmark times.
        times_reference: whether the reference is timed, and so part of the gate, where another backend serves.
        constrain: makes a model compute its weights, by one of ``constraints``; for the whole training step of the
            cases that have ``inputs``.
        optimizer: of the raw tensors; for a training step of the weights alone (any case).
        memory: bytes that a case takes at most, so that it is left out where there is less.
        tuned: time the middling cases again where memory is kept.
        seconds: for the timing of one case, and with ``--quick``.
    """

    name: str
    ops: tuple[str, ...]
    cases: Sequence[Case]
    variants: Callable[[Any], Iterable[Variant]]
    judge: Callable[[Any], Judge]
    floor: Callable[[Any], tuple[int, int]]
    verdicts: Callable[[Sequence[dict[str, Any]], str], list[Verdict]]
    problem: Callable[[Any, torch.device], Problem] = Problem
    concerns: Callable[[Any, str], bool] = lambda case, op_case: True
    times_reference: bool = True
    constrain: Callable[[nn.Module, str], nn.Module] | None = None
    constraints: Sequence[str] = ("ours", "eager")
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    memory: Callable[[Any], int] = lambda case: 0
    tuned: bool = True
    seconds: tuple[float, float] = (6.0, 2.0)


def find_rooms() -> dict[str, Room]:
    found = {}
    for info in pkgutil.iter_modules(rooms.__path__):
        room: Room = importlib.import_module(f"{rooms.__name__}.{info.name}").ROOM
        found[room.name] = room
    return found
