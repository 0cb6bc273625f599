"""Filters that follow a condition: each transform, shape and number of conditions, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...case import Room, Variant
from . import model, problem
from . import variants as single
from .model import ModelCase, ModelProblem
from .problem import FilterCase, FilterProblem, case
from .targets import verdicts
from .truth import Twice

GRID = "grid_sample", "grid_sample compiled"
WARP = (*GRID, "matmul", "matmul compiled")
ARC = "arc", "arc compiled", "grid_sample", "matmul"
STYLEGAN = "stylegan2", "stylegan2 compiled"
MLP = "mlp", "mlp compiled"
FORMULA = "formula", "formula compiled"
CASES = (
    case("rotate", 256, 256, 3, 32, *WARP),
    case("rotate", 256, 256, 3, 32, *WARP, frozen=True),
    case("rotate", 256, 256, 3, 8, *WARP),
    case("rotate", 256, 256, 3, 1, *WARP),
    case("rotate", 64, 64, 3, 8, "grid_sample", "matmul", quick=True),
    case("rotate", 64, 64, 3, 1, *WARP),
    case("rotate", 64, 64, 5, 32, *WARP),
    case("rotate", 64, 64, 7, 8, *WARP),
    case("rotate", 512, 512, 3, 8, *WARP),
    case("rotate_border", 256, 256, 3, 32, *ARC),
    case("rotate_border", 256, 256, 3, 32, *ARC, frozen=True),
    case("scale", 256, 256, 3, 32, *GRID),
    case("shear", 256, 256, 3, 32, *GRID),
    case("affine", 256, 256, 3, 32, *WARP),
    case("affine", 64, 64, 5, 8, *WARP),
    case("learned", 256, 256, 3, 32, "matmul", "matmul compiled"),
    case("learned", 256, 256, 3, 32, "matmul", "matmul compiled", frozen=True),
    case("learned", 64, 64, 3, 8, "matmul", quick=True),
    case("learned", 64, 64, 7, 8, "matmul", "matmul compiled"),
    case("demodulate", 256, 256, 3, 32, *STYLEGAN),
    case("demodulate", 256, 256, 3, 32, *STYLEGAN, frozen=True),
    case("demodulate", 256, 256, 3, 1, *STYLEGAN),
    case("demodulate", 512, 512, 3, 8, *STYLEGAN),
    case("demodulate", 512, 512, 1, 32, *STYLEGAN),
    case("demodulate", 64, 64, 3, 8, "stylegan2", quick=True),
    case("modulate", 256, 256, 3, 32, *STYLEGAN),
    case("filter_mlp", 256, 256, 3, 32, *MLP),
    case("filter_mlp", 256, 256, 3, 32, *MLP, frozen=True),
    case("filter_mlp", 256, 256, 3, 1, *MLP),
    case("filter_mlp", 64, 64, 5, 8, *MLP),
    case("filter_mlp", 64, 64, 3, 8, "mlp", quick=True),
    case("experts", 256, 256, 3, 32, "mix", "mix compiled"),
    case("steerable", 256, 256, 3, 32, "formula"),
    case("steerable", 64, 64, 5, 8, "formula"),
    case("flip", 256, 256, 3, 32, *FORMULA),
    case("permute", 256, 256, 3, 32, "formula"),
    case("low_rank", 256, 256, 3, 32, *FORMULA),
    case("affine_hypernet", 256, 256, 3, 32, *FORMULA),
    model.case(1),
    model.case(8),
    model.case(model.BATCH),
)


def problem_of(chosen: FilterCase | ModelCase, device: torch.device) -> FilterProblem | ModelProblem:
    return ModelProblem(chosen, device) if isinstance(chosen, ModelCase) else FilterProblem(chosen, device)


def variants(of: FilterProblem | ModelProblem) -> Iterator[Variant]:
    return model.variants(of) if isinstance(of, ModelProblem) else single.variants(of)


def floor(of: FilterProblem | ModelProblem) -> tuple[int, int]:
    return model.floor(of) if isinstance(of, ModelProblem) else problem.floor(of)


ROOM = Room(
    name="filters",
    ops=(
        *(
            f"{name}_{way}"
            for name in ("filter_warp", "warp_matrix", "modulate", "filter_mlp")
            for way in ("fwd", "bwd")
        ),
    ),
    cases=CASES,
    variants=variants,
    judge=Twice,
    floor=floor,
    verdicts=verdicts,
    problem=problem_of,
    times_reference=False,
    memory=lambda chosen: chosen.memory,
    tuned=False,
    seconds=(3.0, 1.0),
)
