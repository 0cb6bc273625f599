"""The other road to a subspace: project gradients, g <- P P' g, under any optimizer and with ordinary weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checks import require_choice, require_int
from ..transform import require_float
from .plan import plain_name
from .projections import NORMALIZE, Projection, projection_of
from .select import Member, choose, initial_sigmas

Parameters = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]


class SubspaceProjection:
    """P for the parameters of a model, to project their gradients with.

    Args:
        parameters: a model; or ``named_parameters()``; or parameters, which are then named by their number.
        dim, projection, seed, normalize, include, exclude: as in :class:`Subspace`.

    For the isometric kinds (``block_hadamard``, ``one_hot``, ``kronecker`` with D = D1 D2) P P' is the orthogonal
    projector on the columns of P; for the others it is near one.

    Attributes:
        step: counts :meth:`redraw`.

    Raises:
        TypeError, ValueError: as :class:`Subspace`.
    """

    def __init__(
        self,
        parameters: Parameters,
        dim: int,
        projection: str | Projection = "block_hadamard",
        seed: int = 0,
        normalize: str = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        require_int("SubspaceProjection", "dim", dim, 1)
        require_int("SubspaceProjection", "seed", seed)
        require_choice("SubspaceProjection", "normalize", normalize, NORMALIZE)
        self.projection = projection_of("SubspaceProjection", projection)
        model = parameters if isinstance(parameters, nn.Module) else _holder("SubspaceProjection", parameters)
        self.members, _ = choose("SubspaceProjection", model, include, exclude, None)
        sizes = {m.name: m.parameter.numel() for m in self.members}
        if not self.projection.normalizes and normalize != "global":
            raise ValueError(f"SubspaceProjection: normalize must be 'global' for {self.projection.kind}")
        self.dim = dim
        self._map = self.projection.map_of(sizes, dim, seed, normalize, initial_sigmas(self.members))
        self.step = 0
        self._steps: dict[torch.device, Tensor] = {}

    def redraw(self) -> None:
        """Take the next P. Raises ``RuntimeError`` for a projection that has one only."""
        if not self.projection.redraws:
            raise RuntimeError(f"SubspaceProjection.redraw: {self.projection.kind} has one P")
        self.step += 1
        self._steps = {}

    def _step(self, device: torch.device) -> Tensor | None:
        if self.step == 0:
            return None
        if device not in self._steps:
            self._steps[device] = torch.tensor(self.step, device=device)
        return self._steps[device]

    @torch.no_grad()
    def coordinates_of(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """P' g, [dim], of gradients by the name of their parameter; one that is missing counts as zero.

        float64 if one of them is, else float32.

        Raises:
            ValueError: no gradient, one of another name or shape.
            TypeError: one that is no dense tensor of a float dtype.
        """
        rows = {name: k for k, name in enumerate(self._map.names)}
        shapes = {m.name: m.parameter.shape for m in self.members}
        for name, g in gradients.items():
            if name not in rows:
                raise ValueError(f"SubspaceProjection: gradients must be of its parameters, there is no {name!r}")
            require_float("SubspaceProjection", name, g)
            if g.shape != shapes[name]:
                raise ValueError(f"SubspaceProjection: {name} must be {list(shapes[name])}, got {list(g.shape)}")
        parts = []
        for group in _alike(gradients):
            tensors = [gradients[name] for name in group]
            parts.append(self._map.adjoint(tensors, [rows[n] for n in group], None, self._step(tensors[0].device)))
        if not parts:
            raise ValueError("SubspaceProjection: no gradient is given")
        wide = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part.to(wide)
        return total

    @torch.no_grad()
    def project_(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Write P P' g over the gradients and return P' g, [dim].

        Tensor by tensor, but for the kinds that compute all rows at once (``fastfood``, ``kronecker``).
        """
        z = self.coordinates_of(gradients)
        rows = {name: k for k, name in enumerate(self._map.names)}
        for group in [[name] for name in gradients] if self.projection.shards else _alike(gradients):
            targets = [gradients[name] for name in group]
            nothing = [g.new_zeros(()).expand(g.shape) for g in targets]  # takes no memory
            step = self._step(targets[0].device)
            for g, projected in zip(
                targets, self._map.project(z, nothing, [rows[n] for n in group], None, step), strict=True
            ):
                g.copy_(projected)
        return z


def project_gradients(parameters: Parameters | None, projection: SubspaceProjection) -> Tensor:
    """Project the gradients of ``parameters`` in place, g <- P P' g, before an optimizer's step.

    Args:
        parameters: the model or parameters that ``projection`` was made for; ``None``: those that it holds itself.
        projection: P. A parameter that it does not know keeps its gradient; one without a gradient counts as zero and
            keeps none; a sparse gradient becomes dense.

    Returns:
        P' g, [dim]: the gradient in the coordinates.

    Raises:
        TypeError: ``projection`` is none.
        ValueError: no parameter of the projection has a gradient, or ``parameters`` are not those of the projection.
    """
    if not isinstance(projection, SubspaceProjection):
        got = type(projection).__name__
        raise TypeError(f"project_gradients: projection must be a wx.SubspaceProjection, got {got}")
    members: Sequence[Member] = projection.members
    if parameters is not None:
        model = parameters if isinstance(parameters, nn.Module) else _holder("project_gradients", parameters)
        there = {plain_name(name): p for name, p in model.named_parameters()}
        missing = [m.name for m in members if m.name not in there or there[m.name].shape != m.parameter.shape]
        if missing:
            raise ValueError(f"project_gradients: parameters must be those of the projection; {missing[0]} is missing")
        members = [m._replace(parameter=there[m.name]) for m in members]
    for m in members:  # P P'g is dense
        if m.parameter.grad is not None and m.parameter.grad.layout != torch.strided:
            m.parameter.grad = m.parameter.grad.to_dense()
    gradients: dict[str, Tensor] = {m.name: m.parameter.grad for m in members if m.parameter.grad is not None}
    if not gradients:
        raise ValueError("project_gradients: no parameter of the projection has a gradient; call backward() first")
    return projection.project_(gradients)


def _alike(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names, in groups of one dtype and device: each takes one call."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, t in tensors.items():
        groups.setdefault((t.dtype, t.device), []).append(name)
    return list(groups.values())


def _holder(owner: str, parameters: Iterable) -> nn.Module:
    """A module with these parameters under their names."""
    holder = nn.Module()
    for number, item in enumerate(parameters):
        name, parameter = item if isinstance(item, tuple) else (str(number), item)
        if not isinstance(name, str) or not isinstance(parameter, nn.Parameter):
            raise TypeError(f"{owner}: parameters must be a model, parameters or (name, parameter) pairs, got {item!r}")
        *path, last = name.split(".")
        module = holder
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(last, parameter)
    return holder
