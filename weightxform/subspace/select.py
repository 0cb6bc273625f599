"""Which parameters of a model take part in a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from ..numerics import FLOAT_DTYPES
from ..transform import describe
from .plan import plain_name


class Member(NamedTuple):
    """A parameter and where it is: tied ones are in several places.

    Attributes:
        name: the first of its qualified names.
        paths: all of them.
    """

    name: str
    parameter: nn.Parameter
    places: list[tuple[nn.Module, str]]
    paths: list[str]

    def matches(self, pattern: str) -> bool:
        owners = (path.rpartition(".")[0] for path in self.paths)
        return any(fnmatchcase(path, pattern) for path in (*self.paths, *owners))


def members_of(model: nn.Module) -> list[Member]:
    """Every parameter of ``model``, once, in the order of ``named_parameters``."""
    found: dict[int, Member] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = plain_name(f"{path}.{name}" if path else name)
            member = found.setdefault(id(parameter), Member(full, parameter, [], []))
            member.paths.append(full)
            if not any(m is module and n == name for m, n in member.places):
                member.places.append((module, name))
    return list(found.values())


def choose(
    owner: str,
    model: nn.Module,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    extra_trainable: Sequence[str] | None,
) -> tuple[list[Member], list[Member]]:
    """(members of the subspace, members trained beside it). Raises ``TypeError`` and ``ValueError``."""
    members = members_of(model)
    patterns = {"include": include, "exclude": exclude, "extra_trainable": extra_trainable}
    for argument, given in patterns.items():
        listed = given is None or (isinstance(given, Iterable) and not isinstance(given, str))
        if not listed or not all(isinstance(p, str) for p in given or ()):
            raise TypeError(f"{owner}: {argument} must be a list of patterns, got {given!r}")
        for pattern in given or ():
            if not any(m.matches(pattern) for m in members):
                there = ", ".join(m.name for m in members[:8]) + (", ..." if len(members) > 8 else "")
                raise ValueError(
                    f"{owner}: {argument} pattern {pattern!r} matches no parameter; there are: {there or 'none'}"
                )

    def matched(member: Member, given: Sequence[str] | None) -> bool:
        return any(member.matches(p) for p in given or ())

    extra = [m for m in members if matched(m, extra_trainable)]
    for member in extra:
        _require_trainable(owner, "extra_trainable", member)
        if include is not None and matched(member, include):
            raise ValueError(f"{owner}: {member.name} matches a pattern of both include and extra_trainable")
    beside = {m.name for m in extra}
    chosen = []
    for member in members:
        if member.name in beside or matched(member, exclude):
            continue
        if not is_lazy(member.parameter) and not member.parameter.numel():
            continue
        if include is None:
            if member.parameter.requires_grad:
                _require_trainable(owner, "model", member)
                chosen.append(member)
        elif matched(member, include):
            _require_trainable(owner, "include", member)
            chosen.append(member)
    names = [m.name for m in members]
    double = [m.name for m in (*chosen, *extra) if names.count(m.name) > 1]
    if double:
        raise ValueError(
            f"{owner}: {double[0]} is the name of two parameters, without what DDP, FSDP and torch.compile put in it; "
            "rename the module of one"
        )
    if not chosen:
        raise ValueError(f"{owner}: no parameter is selected; frozen ones take part only after requires_grad_()")
    devices = {m.parameter.device for m in chosen}
    if len(devices) > 1:
        raise ValueError(f"{owner}: the parameters must be on one device, got {', '.join(sorted(map(str, devices)))}")
    return chosen, extra


def _require_trainable(owner: str, argument: str, member: Member) -> None:
    parameter = member.parameter
    if parameter.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{owner}: {argument}: {member.name} must be float64, float32, bfloat16 or float16, got "
            f"{describe(parameter)}; exclude it"
        )
    if not parameter.requires_grad:
        raise ValueError(f"{owner}: {argument}: {member.name} is frozen; requires_grad_() it first, or exclude it")


def initial_sigmas(members: Sequence[Member]) -> dict[str, float]:
    """The usual scale of each tensor's initial values, 1/sqrt(fan_in); a vector has that of the weight beside it."""
    sigmas = {}
    for member in members:
        shape: Sequence[int] = member.parameter.shape
        if len(shape) < 2:
            beside = member.places[0][0]._parameters.get("weight")
            shape = beside.shape if beside is not None else shape
        sigmas[member.name] = fan_in_sigma(shape)
    return sigmas


def fan_in_sigma(shape: Sequence[int]) -> float:
    """1/sqrt(fan_in) for two axes or more, else 1."""
    fan_in = math.prod(shape[1:]) if len(shape) >= 2 else 0
    return fan_in**-0.5 if fan_in else 1.0
