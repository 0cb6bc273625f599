"""The ops of warp matrices: schemas, fakes, cases and floors. The maths is in ``reference.py``."""

from __future__ import annotations

import torch

from ..registry import Case, Op, register
from . import reference

_OPTIONS = "str kind, int height, int width, float dy, float dx, str interpolation, str padding"


def _fake_fwd(params, kind, height, width, dy, dx, interpolation, padding):
    return params.new_empty((params.shape[0], height * width, height * width))


def _fake_bwd(grad, params, kind, height, width, dy, dx, interpolation, padding):
    return torch.empty_like(params, memory_format=torch.contiguous_format)


def _values(kind: str, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Of a warp that leaves most taps inside, and no tap of the output on one of the input."""
    noise = torch.rand(batch, reference.KINDS[kind], generator=generator, dtype=torch.float64)
    if kind == "rotate":
        return noise * 6.2 - 3.1
    if kind == "scale":
        return noise + 0.6
    if kind == "shear":
        return noise - 0.5
    middle = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    return middle + (noise - 0.5) * 0.9


def _case_fwd(kind: str, batch: int, height: int, width: int, interpolation="bilinear", padding="zeros", d=1.0) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        params = _values(kind, batch, generator).to(dtype).to(device)
        return params, kind, height, width, 1.0, d, interpolation, padding

    return make


def _case_bwd(*row) -> Case:
    def make(dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> tuple:
        params, *options = _case_fwd(*row)(dtype, device, generator)
        taps = options[1] * options[2]
        grad = torch.randn(params.shape[0], taps, taps, generator=generator, dtype=torch.float64)
        return grad.to(dtype).to(device), params, *options

    return make


# kind, conditions, height, width
_CASES: dict[str, tuple] = {
    "rotate": ("rotate", 7, 3, 3),
    "rotate_border": ("rotate", 5, 5, 5, "bilinear", "border"),
    "rotate_bicubic": ("rotate", 3, 4, 4, "bicubic"),
    "rotate_bicubic_border": ("rotate", 3, 5, 3, "bicubic", "border"),
    "rotate_dilated": ("rotate", 3, 3, 5, "bilinear", "zeros", 2.0),
    "many": ("rotate", 67, 3, 3),
    "affine": ("affine", 4, 3, 3),
    "affine_bicubic_border": ("affine", 3, 7, 7, "bicubic", "border"),
    "scale": ("scale", 4, 5, 5),
    "scale_row": ("scale", 4, 1, 7, "bilinear", "border"),
    "shear": ("shear", 4, 3, 3, "bicubic"),
    "one_tap": ("affine", 2, 1, 1),
    "large": ("rotate", 2, 14, 11),
    "empty": ("rotate", 0, 3, 3),
}
_FLOATS = (torch.float64, torch.float32)

warp_matrix_fwd = register(
    Op(
        name="warp_matrix_fwd",
        schema=f"(Tensor params, {_OPTIONS}) -> Tensor",
        reference=reference.forward,
        fake=_fake_fwd,
        cases={name: _case_fwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda params, kind, height, width, *_: (
            params.nbytes + params.shape[0] * (height * width) ** 2 * params.element_size()
        ),
        dtypes=_FLOATS,
    )
)

warp_matrix_bwd = register(
    Op(
        name="warp_matrix_bwd",
        schema=f"(Tensor grad, Tensor params, {_OPTIONS}) -> Tensor",
        reference=reference.backward,
        fake=_fake_bwd,
        cases={name: _case_bwd(*row) for name, row in _CASES.items()},
        bytes_moved=lambda grad, params, *_: grad.nbytes + 2 * params.nbytes,
        dtypes=_FLOATS,
    )
)
