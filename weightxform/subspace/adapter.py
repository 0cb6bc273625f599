"""Adapter files: z, what P is, and which theta0 it belongs to. A safetensors file, a few kilobytes; no code in it.

Tensors: ``coordinates``, ``scales``, ``buffer.<name>`` for the model's persistent buffers, ``param.<name>`` for extra
trainables, ``basis`` for a learned one. The metadata has ``weightxform``, a JSON description (specification of the
projections, section 13, and ``structure``), and ``sha256`` of the description and of all tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..transform import describe, require_float
from .maps import ImplicitMap
from .plan import TILE, VERSION, in_order, plain_name
from .projections import NAMED, NORMALIZE, Dense, Learned, Projection, of_file
from .select import Member, initial_sigmas, members_of
from .structure import STRUCTURES, coordinates_of

if TYPE_CHECKING:
    from .module import Subspace

FORMAT = "subspace"
_KEYS = {
    "format": str, "version": int, "kind": str, "d": int, "seed": int, "tile": int, "columns": str, "normalize": str,
    "scale": (list, type(None)), "form": (str, type(None)), "diag": (str, type(None)), "K": (int, type(None)),
    "redraw": (str, type(None)), "step": int, "structure": str, "tensors": list, "theta0": str,
    "basis": (str, type(None)), "order": (list, type(None)),
}  # fmt: skip
_WIDTHS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def fingerprint(tensor: Tensor) -> str:
    """A 64-bit sum over the elements' bits and places, in hex: it guards against a mistake, not an attacker.

    Order-free, so that it can be computed in parts. Half and float copies of one model have different ones.
    """
    bits = tensor.detach().contiguous().flatten().view(_WIDTHS[tensor.element_size()])
    mask = (1 << (8 * tensor.element_size())) - 1
    total = 0
    for start in range(0, bits.numel(), 1 << 22):
        u = bits[start : start + (1 << 22)].to(torch.int64)
        if mask >> 63 == 0:
            u = u & mask
        x = u + torch.arange(start + 1, start + 1 + u.numel(), device=u.device) * _signed(0x9E3779B97F4A7C15)
        x = (x ^ ((x >> 32) & 0xFFFFFFFF)) * _signed(0xD6E8FEB86659FD93)
        x = x ^ ((x >> 32) & 0xFFFFFFFF)
        total += int(x.sum())
    return f"{total & (2**64 - 1):016x}"


def _compact(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    h = hashlib.sha256(description.encode())
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        h.update(_compact([name, str(t.dtype), list(t.shape)]))
        h.update(ctypes.string_at(t.data_ptr(), t.nbytes))
    return h.hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tensor_list(named: Sequence[tuple[str, Tensor]]) -> list[list[Any]]:
    """[name, shape, dtype, fingerprint] in canonical order."""
    order = in_order([name for name, _ in named])
    return [[name, list(t.shape), _dtype_name(t), fingerprint(t)] for name, t in (named[i] for i in order)]


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[plain_name(f"{path}.{name}" if path else name)] = buffer
    return found


def _require_packages(what: str) -> None:
    missing = [name for name in ("numpy", "safetensors") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"Subspace.{what} needs {' and '.join(missing)}: pip install 'weightxform[adapters]'")


# writing


def _description(sub: Subspace) -> dict[str, Any]:
    options = sub.projection.options()
    columns, nonzeros = options.get("columns", "auto"), options.get("K")
    if isinstance(sub._maps[0], ImplicitMap) and sub.structure != "per_tensor":  # what the options came to
        plan = sub._maps[0].plan
        columns, nonzeros = "packed" if plan.packed else "name", plan.strata if sub.kind == "sparse" else None
    tensors = _tensor_list(list(zip(sub.names, sub._theta0(), strict=True)))
    stored = sub.projection.basis if isinstance(sub.projection, Dense) else None
    return {
        "format": FORMAT, "version": VERSION, "kind": sub.kind, "d": sub.dim, "seed": sub.seed,
        "tile": options.get("tile", TILE), "columns": columns, "normalize": sub.normalize,
        "scale": [sub._sigmas[name] for name, *_ in tensors] if sub.normalize == "init" else None,
        "form": options.get("form"), "diag": options.get("diag"),
        "K": nonzeros,
        "redraw": sub.redraws, "step": 0 if sub.step is None else int(sub.step), "structure": sub.structure,
        "tensors": tensors, "theta0": hashlib.sha256(_compact(tensors)).hexdigest(),
        "basis": None if stored is None else fingerprint(stored), "order": None if stored is None else list(sub.names),
    }  # fmt: skip


def save(sub: Subspace, path: str | PathLike[str]) -> None:
    """See :meth:`Subspace.save`."""
    _require_packages("save")
    from safetensors.torch import save as to_bytes

    trained = {"coordinates": sub.coordinates, "scales": sub.scales}
    tensors: dict[str, Tensor] = {name: t for name, t in trained.items() if t is not None}
    beside = {m.name: m.parameter for m in members_of(sub.model)}
    tensors |= {f"param.{name}": beside[name] for name in sub.extra_names}
    for name, t in tensors.items():
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"Subspace.save: {name} must be finite, it has NaN or infinite values")
    tensors |= {f"buffer.{name}": t for name, t in _persistent_buffers(sub.model).items()}
    if isinstance(sub.projection, Learned):
        tensors["basis"] = sub.projection.basis
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    description = _compact(_description(sub)).decode()
    data = to_bytes(tensors, {"weightxform": description, "sha256": _digest(description, tensors)})
    target = Path(path)
    beside_it = target.with_name(f".{target.name}.{os.getpid()}")
    try:  # whole or not at all
        beside_it.write_bytes(data)
        os.replace(beside_it, target)
    except BaseException:
        beside_it.unlink(missing_ok=True)
        raise


# reading


def _is_row(row: Any) -> bool:
    """[name, shape, dtype, fingerprint]?"""
    return isinstance(row, list) and [type(x) for x in row] == [str, list, str, str]


class _File:
    """A checked adapter file."""

    def __init__(self, path: str | PathLike[str]) -> None:
        _require_packages("load")
        from safetensors import SafetensorError, safe_open

        self.path = os.fspath(path)
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                self.tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as e:
            raise self.error(f"is no safetensors file, or damaged ({e})") from e
        text, digest = metadata.get("weightxform"), metadata.get("sha256")
        if text is None or digest is None:
            raise self.error("is no adapter: it has no description")
        if digest != _digest(text, self.tensors):
            raise self.error("is damaged: its checksum is another")
        try:
            self.about: dict[str, Any] = json.loads(text)
        except ValueError as e:
            raise self.error(f"is damaged: its description is no JSON ({e})") from e
        self._check_description()
        self._check_tensors()

    def error(self, what: str) -> ValueError:
        return ValueError(f"Subspace.load: {self.path} {what}")

    def _check_description(self) -> None:
        about = self.about
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise self.error("is no adapter of a Subspace")
        if about.get("version") != VERSION:
            raise self.error(f"has version {about.get('version')!r}; this release reads version {VERSION}")
        if set(about) != set(_KEYS):
            odd = sorted(set(about) ^ set(_KEYS))
            raise self.error(f"has unknown or missing entries in its description: {', '.join(odd)}")
        for key, kinds in _KEYS.items():
            if not isinstance(about[key], kinds) or isinstance(about[key], bool):  # type: ignore[arg-type]
                raise self.error(f"has a wrong {key!r} in its description: {about[key]!r}")
        if about["kind"] not in (*NAMED, Dense.kind, Learned.kind):
            raise self.error(f"has an unknown kind of projection, {about['kind']!r}")
        if about["normalize"] not in NORMALIZE or about["structure"] not in STRUCTURES:
            raise self.error("has an unknown normalize or structure")
        if about["theta0"] != hashlib.sha256(_compact(about["tensors"])).hexdigest():
            raise self.error("is damaged: the hash of its list of tensors is another")
        self._check_values()

    def _check_values(self) -> None:
        about = self.about
        names = [row[0] for row in about["tensors"] if _is_row(row)]
        stored = about["kind"] in (Dense.kind, Learned.kind)
        fits = {
            "d": about["d"] >= 1,
            "seed": -(2**63) <= about["seed"] < 2**63,
            "K": about["K"] is None or (about["kind"] == "sparse" and about["K"] >= 1),
            "form": about["kind"] != "one_hot" or about["form"] in ("signed", "unsigned"),
            "scale": (about["normalize"] == "init") == (about["scale"] is not None),
            "redraw": about["redraw"] in (None, "step"),
            "step": 0 <= about["step"] < 2**32 and (about["redraw"] is not None or about["step"] == 0),
            "tensors": 0 < len(set(names)) == len(about["tensors"]),
            "order": sorted(map(str, about["order"] or names)) == sorted(names) and (about["order"] is None) != stored,
            "basis": (about["basis"] is None) != stored,
        }
        wrong = [key for key, fit in fits.items() if not fit]
        if wrong:
            raise self.error(f"has a wrong {wrong[0]!r} in its description: {about[wrong[0]]!r}")

    def _check_tensors(self) -> None:
        known = {"coordinates", "scales", "basis"}
        odd = [n for n in self.tensors if n not in known and not n.startswith(("buffer.", "param."))]
        if odd:
            raise self.error(f"has an unknown tensor {odd[0]!r}")
        if ("basis" in self.tensors) != (self.about["kind"] == Learned.kind):
            raise self.error("has a basis that its kind does not take, or lacks one")
        for name in ("coordinates", *(n for n in self.tensors if n == "scales" or n.startswith("param."))):
            t = self.tensors.get(name)
            if t is None or not t.is_floating_point() or not bool(torch.isfinite(t).all()):
                raise self.error(f"has no {name} of finite numbers")

    def projection(self, basis: Tensor | None) -> Projection:
        about = self.about
        if about["kind"] == Dense.kind:
            if basis is None:
                raise self.error("was made with wx.subspace.Dense: give its matrix as basis=")
            require_float("Subspace.load", "basis", basis)
            if fingerprint(basis) != about["basis"]:
                raise self.error("was made with another basis")
        elif basis is not None:
            raise ValueError(f"Subspace.load: basis is for wx.subspace.Dense only, the adapter is {about['kind']!r}")
        else:
            basis = self.tensors.get("basis")
        try:
            return of_file(about["kind"], about, basis)
        except (ValueError, TypeError) as e:
            raise self.error(f"describes no projection: {e}") from e

    def members(self, model: nn.Module) -> tuple[list[Member], list[Member]]:
        """(members of the subspace, extra trainables), all of whose values are those of the training."""
        there = {m.name: m for m in members_of(model)}
        listed = {entry[0]: entry for entry in self.about["tensors"]}
        for name, entry in listed.items():
            if name not in there:
                raise self.error(f"is for another model: this one has no parameter {name!r}")
            p = there[name].parameter
            if [list(p.shape), _dtype_name(p)] != entry[1:3]:
                raise self.error(f"is for another model: {name} was {entry[2]}{entry[1]}, here it is {describe(p)}")
        for name, entry in listed.items():
            if fingerprint(there[name].parameter) != entry[3]:
                raise self.error(f"is for other weights: the values of {name} are not those that it was trained on")
        chosen = [there[n] for n in self.about["order"] or [n for n in there if n in listed]]
        extra = self._pairs("param.", {n: m.parameter for n, m in there.items()}, "parameter")
        twice = [name for name in extra if name in listed]
        if twice:
            raise self.error(f"trains {twice[0]}, which is a weight of the subspace, beside it as well")
        return chosen, [there[name] for name in extra]

    def _pairs(self, prefix: str, there: Mapping[str, Tensor], what: str) -> dict[str, tuple[Tensor, Tensor]]:
        """name -> (the model's tensor, the file's)."""
        pairs = {}
        for full, value in self.tensors.items():
            if not full.startswith(prefix):
                continue
            name = full.removeprefix(prefix)
            if name not in there:
                raise self.error(f"is for another model: this one has no {what} {name!r}")
            if (there[name].shape, there[name].dtype) != (value.shape, value.dtype):
                raise self.error(f"is for another model: {what} {name} is {describe(value)} in the file")
            pairs[name] = there[name], value
        return pairs

    def values(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        parameters = {m.name: m.parameter for m in members_of(model)}
        pairs = {**self._pairs("buffer.", _persistent_buffers(model), "buffer")}
        return [*pairs.values(), *self._pairs("param.", parameters, "parameter").values()]


def load(cls: type[Subspace], path: str | PathLike[str], model: nn.Module, basis: Tensor | None) -> Subspace:
    """See :meth:`Subspace.load`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Subspace.load: model must be an nn.Module, got {type(model).__name__}")
    file = _File(path)
    about = file.about
    projection = file.projection(basis)
    chosen, extra = file.members(model)
    values = file.values(model)
    if about["scale"] is not None:
        sigmas = initial_sigmas(chosen)
        if about["scale"] != [sigmas[entry[0]] for entry in about["tensors"]]:
            raise file.error("is for another model: the initial scales of its tensors differ")
    coordinates, scales = file.tensors["coordinates"], file.tensors.get("scales")
    total = coordinates_of(chosen, about["d"], about["structure"])
    if coordinates.shape != (total,) or (scales is None) != (about["structure"] == "shared"):
        raise file.error(f"is damaged: coordinates must be {total} numbers, and scales as its structure says")
    if scales is not None and scales.shape != (len(chosen),):
        raise file.error(f"is damaged: scales must be {len(chosen)} numbers, got {describe(scales)}")
    sub = cls.__new__(cls)
    nn.Module.__init__(sub)
    sub._set_up(
        model, chosen, extra, about["d"], projection, about["seed"], about["normalize"], about["redraw"],
        about["structure"],
    )  # fmt: skip
    values.append((sub.coordinates, coordinates))
    if sub.scales is not None and scales is not None:
        values.append((sub.scales, scales))
    if sub.step is not None:
        values.append((sub.step, torch.tensor(about["step"])))
    with torch.no_grad():
        for target, value in values:
            target.copy_(value)
    return sub
