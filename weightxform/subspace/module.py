"""Subspace: a whole model whose weights are theta0 + P z, with z the only trained tensor."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..bucket import Group
from ..checks import require_choice, require_int
from ..computed import install, new_slot, refuse
from ..slot import Slot
from ..swap import child_name, set_slots, slots_of
from ..versions import bump
from .function import scaled
from .maps import Map
from .projections import NORMALIZE, Projection, projection_of
from .select import Member, choose, initial_sigmas, members_of
from .structure import STRUCTURES, coordinates_of, difference, maps_of
from .weight import ProjectedWeight

_LAST_STEP = 2**32 - 2
_redrawn: weakref.WeakSet[Subspace] = weakref.WeakSet()


class Subspace(nn.Module):
    """``model`` with weights theta0 + P z: z, :attr:`coordinates`, is all that is trained.

    theta0 is the weights at the time of wrapping; z begins as zeros, so that the model computes at first what it did.
    P [D, dim] has a row for each weight that takes part and is not stored but for the kinds that say so. The model
    keeps its structure, names, hooks, buffers and tied weights: its layers' weights become computed ones (as with
    ``ComputedParameter``), the parameters in their place hold theta0 and are frozen. Weights are computed once for
    each value of z, whatever the number of forwards.

    Args:
        model: changed in place; also :attr:`model`.
        dim: d, the number of coordinates, from 1 to the number of weights D.
        projection: which P: ``"block_hadamard"``, ``"one_hot"``, ``"sparse"``, ``"rademacher"``, ``"gaussian"``,
            ``"fastfood"``, ``"kronecker"``, or one of ``wx.subspace`` with options: ``wx.subspace.Dense(basis)``.
        seed: of P. The same seed gives the same P on every device, for every number of threads and processes.
        normalize: acts as a learning rate for each tensor. ``"global"``: columns of P have norm 1 (in expectation for
            random entries), the change of a weight is about |z| / sqrt(D) everywhere. ``"per_tensor"``: the part of P
            in each tensor has columns of norm 1. ``"init"``: rows in proportion to 1/sqrt(fan_in), columns of norm 1.
        include, exclude: shell patterns for qualified names of parameters or of their modules (``"head.*"``). Default:
            every parameter that requires a gradient, and none.
        extra_trainable: patterns of parameters that are trained as they are, beside z.
        redraw: ``"step"`` takes another P after each optimizer step over :attr:`coordinates`: theta becomes theta0 and
            z zero (random bases descent, Gressmann et al. 2020). An optimizer's momentum is then that of another P.
        structure: ``"shared"``: theta_t = theta0_t + P_t z. ``"said"``: theta_t = theta0_t + scale_t P_t z with a
            trained scale for each tensor, 1 at first (Aghajanyan et al. 2021). ``"per_tensor"``: theta_t = theta0_t +
            scale_t P_t z_t, every tensor with a P and min(dim, its elements) coordinates of its own.
        bucket_bytes: weights are computed, and give up their gradients, in groups of this size.

    Attributes:
        coordinates: ``nn.Parameter`` [dim], float64 if a weight is, else float32.
        scales: ``nn.Parameter`` [tensors]; ``None`` for ``structure="shared"``.
        names: of the parameters that take part, in the order of the model.

    Frozen parameters stay as they are. A checkpoint of the plain model, loaded into ``sub.model``, moves theta0. Under
    DDP d numbers are reduced; with FSDP2 wrap first, then ``fully_shard`` the blocks and the Subspace.

    Sources: Li et al., "Measuring the intrinsic dimension of objective landscapes", ICLR 2018; ``reference.py``.

    Raises (before anything is changed):
        TypeError: an argument of another kind; a selected parameter that is an integer or complex.
        ValueError: ``dim`` below 1 or above D, an unknown projection, a basis of another shape, a pattern that matches
            nothing, no parameter or a frozen one selected, parameters on several devices, a weight that is computed
            already or cannot be.
    """

    coordinates: nn.Parameter
    scales: nn.Parameter | None
    step: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        projection: str | Projection = "block_hadamard",
        seed: int = 0,
        normalize: str = "global",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        extra_trainable: Sequence[str] | None = None,
        redraw: str | None = None,
        structure: str = "shared",
        bucket_bytes: int = 25 * 2**20,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"Subspace: model must be an nn.Module, got {type(model).__name__}")
        require_int("Subspace", "dim", dim, 1)
        require_int("Subspace", "seed", seed)
        require_int("Subspace", "bucket_bytes", bucket_bytes, 1)
        require_choice("Subspace", "normalize", normalize, NORMALIZE)
        require_choice("Subspace", "structure", structure, STRUCTURES)
        projection = projection_of("Subspace", projection)
        if redraw is not None:
            require_choice("Subspace", "redraw", redraw, ("step",))
            if not projection.redraws:
                raise ValueError(f"Subspace: redraw must be None for {projection.kind}, which has no other P")
        chosen, extra = choose("Subspace", model, include, exclude, extra_trainable)
        self._set_up(model, chosen, extra, dim, projection, seed, normalize, redraw, structure, bucket_bytes)

    def _set_up(
        self,
        model: nn.Module,
        chosen: Sequence[Member],
        extra: Sequence[Member],
        dim: int,
        projection: Projection,
        seed: int,
        normalize: str,
        redraw: str | None,
        structure: str,
        bucket_bytes: int = 25 * 2**20,
    ) -> None:
        transforms = [ProjectedWeight(self, k) for k in range(len(chosen))]
        for member, transform in zip(chosen, transforms, strict=True):
            for module, name in member.places:
                if isinstance(module, Subspace):
                    raise ValueError(f"Subspace: model has a Subspace already, whose {name} is trained; bake it first")
                if name in slots_of(module):
                    raise ValueError(f"Subspace: {member.name} is computed already; exclude it, or wx.bake it first")
                refuse(module, name, member.parameter, transform)
        maps = maps_of(chosen, dim, projection, seed, normalize, structure)
        for k, member in enumerate(chosen):  # here and not in a graph that torch.compile makes
            maps[k if len(maps) > 1 else 0].tables(member.parameter, None)

        self.projection, self.dim, self.seed = projection, dim, seed
        self.normalize, self.structure, self.redraws = normalize, structure, redraw
        self.names = tuple(m.name for m in chosen)
        self.extra_names = tuple(m.name for m in extra)
        self._maps, self._sigmas = maps, initial_sigmas(chosen)
        self._rows = [maps[0].names.index(n) for n in self.names] if len(maps) == 1 else [0] * len(maps)
        first = chosen[0].parameter
        wide = any(m.parameter.dtype == torch.float64 for m in chosen)
        options: Any = {"dtype": torch.float64 if wide else torch.float32, "device": first.device}
        self.coordinates = nn.Parameter(torch.zeros(coordinates_of(chosen, dim, structure), **options))
        scales = None if structure == "shared" else nn.Parameter(torch.ones(len(chosen), **options))
        self.register_parameter("scales", scales)
        step = None if redraw is None else torch.zeros((), dtype=torch.int64, device=first.device)
        self.register_buffer("step", step)
        self._places = [list(m.places) for m in chosen]
        self._thawed = [place for m in members_of(model) if m.parameter.requires_grad for place in m.places]
        model.requires_grad_(False)
        for member in extra:
            member.parameter.requires_grad_()
        self._install(chosen, transforms)
        self._facts: list[tuple[int, bool]] = []
        self._gathered: dict[int, bool] = {}  # members whose parameter is theta already; see sharded.py
        self._seen: tuple[Tensor, Tensor | None] | None = None  # z and scales of this forward, once FSDP has them
        self.model = model
        if not projection.shards:  # each call would compute all weights
            bucket_bytes = 2**62
        self._group = Group.over(model, [m.places[0] for m in chosen], bucket_bytes, accumulates=False)
        if redraw is not None:
            _redrawn.add(self)

    def _install(self, chosen: Sequence[Member], transforms: Sequence[ProjectedWeight]) -> None:
        for member, transform in zip(chosen, transforms, strict=True):
            slot: Slot | None = None
            for module, name in member.places:
                if slot is None:
                    slot = new_slot(module, member.parameter)
                else:
                    slot.users += 1
                install(module, name, member.parameter, transform, slot)

    @property
    def kind(self) -> str:
        return self.projection.kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``."""
        if self._seen is not None:
            self._seen = None
        return self.model(*args, **kwargs)

    def extra_repr(self) -> str:
        total = sum(t.numel() for t in self._theta0())
        return f"{self.dim} of {total}, {self.projection}, seed={self.seed}, normalize={self.normalize!r}"

    # what the weights ask for

    def _state(self) -> tuple[Tensor, ...]:
        parameters = self._parameters  # asked at every read of a weight
        tensors: Any = (parameters["coordinates"], parameters["scales"], self._buffers["step"])
        state = tuple([t for t in tensors if t is not None])
        if type(state[0]) is nn.Parameter:
            facts = [(t.data_ptr(), t.requires_grad) for t in state]
            if facts != self._facts:  # z.data = x, vector_to_parameters, requires_grad_(): no version counter sees them
                bump(state)
                self._facts = facts
        return state

    def _compute(self, members: Sequence[int], raws: Sequence[Tensor]) -> list[Tensor]:
        """theta of these members."""
        if not torch.compiler.is_compiling():
            self._state()  # what it notices must be noted before the computation
        if self.scales is None:
            return self._maps[0].project(self.coordinates, raws, [self._rows[m] for m in members], None, self.step)
        outs = []
        for member, raw in zip(members, raws, strict=True):
            z, own = self._z_of(member)
            outs += own.project(z, [raw], [self._rows[member]], None, self.step)
        return outs

    def _attach(self, member: int, theta: Tensor) -> Tensor:
        """``theta``, which FSDP gathered, with its gradient."""
        from .sharded import attached

        z, own = self._z_of(member)
        return attached(own.call([self._rows[member]], None), own.tables(theta, self.step), z, theta)

    def _z_of(self, member: int, trained: tuple[Tensor, Tensor | None] | None = None) -> tuple[Tensor, Map]:
        """What P_t of a member is multiplied with, and P_t. ``trained``: other coordinates and scales."""
        z, scales = (self.coordinates, self.scales) if trained is None else trained
        which = member if self.structure == "per_tensor" else 0
        z = self._part(z, member) if self.structure == "per_tensor" else z
        return z if scales is None else scaled(scales, z, member), self._maps[which]

    def _part(self, z: Tensor, member: int) -> Tensor:
        start = sum(m.dim for m in self._maps[:member])
        return z[start : start + self._maps[member].dim]

    def _theta0(self) -> list[Tensor]:
        return [places[0][0]._parameters[places[0][1]] for places in self._places]  # type: ignore[misc]

    # what a user does with it

    @torch.no_grad()
    def reset(self) -> None:
        """z = 0 (and scales of 1): the model computes with theta0 again."""
        self.coordinates.zero_()
        if self.scales is not None:
            self.scales.fill_(1)

    @torch.no_grad()
    def redraw(self) -> None:
        """Make the present weights theta0, z zero, and take the next P. ``redraw="step"`` does so after each step.

        Raises:
            RuntimeError: not made with ``redraw``; or 2^32 - 1 of them were drawn.
        """
        if self.step is None:
            raise RuntimeError("Subspace.redraw: it was made with redraw=None and has one P")
        if not self.step.is_cuda and int(self.step) >= _LAST_STEP:
            raise RuntimeError("Subspace.redraw: 2^32 - 1 projections were drawn; there are no more")
        self._fold()
        self.reset()
        self.step += 1

    def _fold(self) -> None:
        for (module, name), *_ in self._places:
            raw = module._parameters[name]
            assert raw is not None
            raw.copy_(getattr(module, name).detach())

    def bake(self) -> nn.Module:
        """The model, plain, with the present weights; its parameters require gradients as they did at first.

        Optimizers of the model's own parameters go on with them: they are the same tensors. The Subspace is of no use
        any more.
        """
        self._check_alone("bake")
        with torch.no_grad():
            self._fold()
        return self._leave()

    def unwrap(self) -> nn.Module:
        """The model, plain, with the weights theta0; otherwise as :meth:`bake`."""
        self._check_alone("unwrap")
        return self._leave()

    def _check_alone(self, what: str) -> None:
        for name, places in zip(self.names, self._places, strict=True):
            for module, attribute in places:
                own = module._modules.get(child_name(attribute))
                if not isinstance(own, ProjectedWeight) or own.owner is not self:
                    raise RuntimeError(
                        f"Subspace.{what}: {name} is not computed by this Subspace alone; it was baked, or has another "
                        "transform on top"
                    )

    def _leave(self) -> nn.Module:
        for places in self._places:
            for module, name in places:
                slots_of(module)[name].forget()
                del module._modules[child_name(name)]
                set_slots(module, {k: s for k, s in slots_of(module).items() if k != name})
        if self._group is not None:
            self._group.leave(self.model)
        _redrawn.discard(self)
        for module, name in self._thawed:  # whatever parameter is there by now
            parameter = module._parameters.get(name)
            if parameter is not None:
                parameter.requires_grad_()
        return self.model

    def shard_rows(self) -> None:
        """Before ``fully_shard``: let each rank compute the rows of theta that it owns, and gather those.

        Without it theta0 is gathered, and each rank computes all rows of a unit; the numbers are the same. Weights in
        one unit with the Subspace's own coordinates are computed in that way in any case, so give the blocks units of
        their own. The Subspace must be sharded before it is used again.

        Raises:
            ValueError: a projection that mixes all weights (``fastfood``, ``kronecker``).
        """
        from .sharded import shard_rows

        if not self.projection.shards:
            raise ValueError(
                f"Subspace.shard_rows: {self.kind} mixes all weights, a rank cannot compute its rows alone"
            )
        shard_rows(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write z, what P is, and the model's buffers and extra trainables: an adapter, a few kilobytes (safetensors).

        theta0 is not in it, only its fingerprint. ``adapter.py`` says what the file holds.

        Raises:
            ValueError: coordinates are not finite.
        """
        from .adapter import save

        save(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str], model: nn.Module, basis: Tensor | None = None) -> Subspace:
        """Wrap ``model`` (which has the weights theta0) as the adapter at ``path`` says: the same weights, bit for bit.

        ``basis``: for ``wx.subspace.Dense``, whose matrix is not in the file. The model may have parameters that the
        adapter does not know; they are frozen. No code of the file is run.

        Raises (before the model is changed):
            ValueError: the file is no adapter, damaged, or of another version; the model has other tensors or values
                than those that it was trained on; coordinates are not finite.
            OSError: the file cannot be read.
        """
        from .adapter import load

        return load(cls, path, model, basis)

    # nn.Module

    def describe(self) -> dict[str, Any]:
        """What P is: the entries of an adapter file's description that a checkpoint must agree in."""
        return {
            "kind": self.kind, "d": self.dim, "seed": self.seed, "normalize": self.normalize,
            "structure": self.structure, "redraw": self.redraws, "names": list(self.names),
            **self.projection.options(),
        }  # fmt: skip

    def get_extra_state(self) -> Tensor:
        """:meth:`describe` as JSON in a uint8 tensor, which every format of checkpoints can hold."""
        return torch.tensor(list(json.dumps(self.describe()).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass  # checked before anything was loaded

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        theirs = state_dict.get(prefix + "_extra_state")
        if theirs is not None and (different := difference(bytes(theirs.tolist()), self.describe())):
            raise ValueError(f"Subspace: the checkpoint is of another projection; {different} differs")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Subspace:
        """``half()`` and ``bfloat16()`` are for the weights: z stays in float32."""
        before = self.coordinates.detach().clone()
        scales = None if self.scales is None else self.scales.detach().clone()
        super()._apply(fn, recurse)
        for parameter, precise in ((self.coordinates, before), (self.scales, scales)):
            if parameter is not None and precise is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = precise.to(parameter.device)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._buffers.get("step") is not None:
            _redrawn.add(self)


def _after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    for sub in list(_redrawn):
        if any(p is sub.coordinates for group in optimizer.param_groups for p in group["params"]):
            sub.redraw()


register_optimizer_step_post_hook(_after_step)
