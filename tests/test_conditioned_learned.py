"""Steerable and learned warps, and sums and chains of transforms."""

from __future__ import annotations

import math

import pytest
import torch
from conditioned_zoo import D, conv, shaken
from torch import nn
from torch.testing import assert_close

from weightxform.conditioned import (
    FilterMLP,
    FilterTransform,
    Flip,
    Learned,
    LearnedResidual,
    LowRank,
    Rotate,
    Steerable,
    Warp,
)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 7])
def test_steerable_turns_smooth_filters_exactly(size):
    """A filter that is a sum of harmonics, sampled at the turned taps. (Its middle is 0, where it has no angle.)"""
    layer = nn.Conv2d(1, 1, size, dtype=D)
    at = torch.arange(size, dtype=D) - (size - 1) / 2
    y, x = torch.meshgrid(at, at, indexing="ij")
    ring = (size - 1) / 2  # the outermost

    def smooth(x, y):
        r, phi = torch.hypot(x, y), torch.atan2(y, x)
        radial = torch.exp(-((r - ring) ** 2) / (2 * 0.4**2)) * (r > 0)
        second = 0.6 * (2 * phi + 0.5).sin() if size > 2 else 0
        return radial * (0.3 + (phi - 0.7).cos() + second)

    for residual in ("bilinear", "keep", "drop"):
        transform = Steerable(residual=residual)
        transform.attach(layer.weight, layer)
        out = transform.at(smooth(x, y)[None, None], {"angle": torch.tensor([0.9, -2.0], dtype=D)})
        for got, angle in zip(out, (0.9, -2.0), strict=True):
            c, s = math.cos(angle), math.sin(angle)
            assert_close(got[0, 0], smooth(c * x - s * y, s * x + c * y))


@pytest.mark.parametrize("size", [3, 4, 5])
def test_steerable_residuals(size):
    layer = nn.Conv2d(2, 3, size, dtype=D)
    w, angles = layer.weight, {"angle": torch.tensor([0.0, math.pi / 2, 0.5, 1.2, 1.7], dtype=D)}
    made = {}
    for residual in ("bilinear", "keep", "drop"):
        transform = Steerable(residual=residual)
        transform.attach(w, layer)
        made[residual] = transform.matrix(angles, w), transform.at(w, angles)
    assert_close(made["bilinear"][1][:2], torch.stack([w, w.rot90(1, (2, 3))]))
    assert_close(made["keep"][1][0], w)
    steered = made["drop"][0]
    assert_close(steered[2] @ steered[3], steered[4])  # angles add on the span
    projection = steered[0]
    assert_close(projection @ projection, projection)
    assert {3: 6, 4: 8, 5: 11}[size] == round(float(projection.trace()))
    rest = torch.eye(size**2, dtype=D) - projection
    rotate = Rotate()
    rotate.attach(w, layer)
    assert_close(made["bilinear"][0], steered + rotate.matrix(angles, w) @ rest)
    assert_close(made["keep"][0], steered + rest)


@pytest.mark.parametrize(
    ("size", "dilation"),
    [((3, 7), 1), ((5, 3), 1), ((2, 3), 1), ((3, 9), 1), (3, (1, 2)), (5, (2, 1)), ((5, 3), (2, 1)), ((3, 5), (3, 2))],
)
def test_steerable_of_kernels_that_are_not_square(size, dilation):
    """What their taps cannot tell is not blown up, and no turn is none."""
    layer = nn.Conv2d(1, 1, size, dilation=dilation, dtype=D)
    angles = {"angle": torch.linspace(0, 2 * math.pi, 25, dtype=D)}
    for residual in ("bilinear", "keep", "drop"):
        transform = Steerable(residual=residual)
        transform.attach(layer.weight, layer)
        a = transform.matrix(angles, layer.weight)
        assert float(torch.linalg.matrix_norm(a, 2).max()) < 2.3
        if residual != "drop":
            assert_close(a[0], torch.eye(a.shape[1], dtype=D))


def test_steerable_frequencies_and_half_types():
    layer = conv(torch.float32)
    transform = Steerable(residual="drop", frequencies=0)
    transform.attach(layer.weight, layer)
    at = transform.at(layer.weight, {"angle": torch.tensor([0.0, 1.0])})
    assert_close(at[0], at[1])  # nothing is left that turns
    full = Steerable()
    full.attach(layer.weight, layer)
    exact = full.constants.clone()
    full.half().float()
    assert torch.equal(full.constants, exact)
    full.double()
    assert full.constants.dtype == D
    assert_close(full.constants, exact.double(), rtol=0, atol=1e-7)


def _network(t, features):
    """L phi + MLP of a learned map, written out."""
    phi = torch.cat([torch.ones(len(features), 1, dtype=D), features], 1)
    a = phi @ t.L
    if t.hidden:
        a = a + nn.functional.silu(features @ t.w1.T + t.b1) @ t.w2.T
    return a


@pytest.mark.parametrize("hidden", [0, 6])
def test_learned_maps_are_their_formula(hidden):
    layer, angle = conv(), torch.tensor([0.3, 2.0], dtype=D)
    features = torch.stack([angle.cos(), (2 * angle).cos(), angle.sin(), (2 * angle).sin()], 1)
    learned, residual = Learned(harmonics=2, hidden=hidden), LearnedResidual(harmonics=2, hidden=hidden)
    for transform in (learned, residual):
        transform.attach(layer.weight, layer)
    assert torch.equal(residual.whole(layer.weight, {"a": angle}), layer.weight.expand(2, -1, -1, -1, -1))
    for transform in (shaken(learned), shaken(residual)):
        a = _network(transform, features).reshape(2, 9, 9)
        expected = torch.einsum("cpq,oiq->coip", a, layer.weight.flatten(2)).reshape(2, *layer.weight.shape)
        assert_close(transform.at(layer.weight, {"a": angle}), expected)
    assert_close(residual.whole(layer.weight, {"a": angle}), layer.weight + expected)


def test_learned_maps_begin_as_their_warp():
    layer = conv()
    quarters = {"angle": torch.arange(4, dtype=D) * (math.pi / 2)}

    def begin(**options):
        transform = Learned(**options)
        transform.attach(layer.weight, layer)
        return transform.at(layer.weight, quarters)

    assert_close(begin(init="identity"), layer.weight.expand(4, -1, -1, -1, -1))
    raw = Learned(size=2, harmonics=None)
    raw.attach(layer.weight, layer)
    assert_close(raw.at(layer.weight, {"c": torch.randn(1, 2, dtype=D)})[0], layer.weight)
    steered = Steerable(residual="drop")  # has two harmonics, so that the fit is exact
    steered.attach(layer.weight, layer)
    assert_close(begin(harmonics=2, init=Steerable(residual="drop")), steered.at(layer.weight, quarters))
    cube = nn.Conv3d(2, 3, (2, 3, 3), dtype=D)
    steered = Steerable(residual="drop", axis=0)
    learned = Learned(harmonics=2, init=Steerable(residual="drop", axis=0))
    for transform in (steered, learned):
        transform.attach(cube.weight, cube)
    assert_close(learned.at(cube.weight, quarters), steered.at(cube.weight, quarters))
    rotate = Rotate()
    rotate.attach(layer.weight, layer)
    angles = {"angle": torch.rand(200, dtype=D) * 2 * math.pi}
    target = rotate.matrix(angles, layer.weight)
    for harmonics, most in ((1, 0.6), (4, 0.15), (8, 0.06)):
        fit = Learned(harmonics=harmonics, hidden=0)
        fit.attach(layer.weight, layer)
        assert (fit.matrix(angles, layer.weight) - target).norm() < most * target.norm()


def test_sums_and_chains_are_one_matrix():
    layer, angle = conv(), {"angle": torch.tensor([0.4, 1.0], dtype=D)}
    w = layer.weight
    rotate = Rotate()
    rotate.attach(w, layer)
    turned_once = rotate.at(w, angle)

    both = Rotate() + LearnedResidual(hidden=3)
    both.attach(w, layer)
    shaken(both)
    assert both.linear() is not None
    assert_close(both.at(w, angle), turned_once + both.parts[1].at(w, angle))

    twice = Rotate() @ Rotate()
    twice.attach(w, layer)
    expected = torch.stack(
        [rotate.at(v, {"angle": a[None]})[0] for v, a in zip(turned_once, angle["angle"], strict=True)]
    )
    assert_close(twice.at(w, angle), expected)

    after = LearnedResidual(hidden=0) @ Rotate()  # a change comes on top of what is before it
    after.attach(w, layer)
    shaken(after)
    change = [after.parts[0].at(v, {"angle": a[None]})[0] for v, a in zip(turned_once, angle["angle"], strict=True)]
    assert_close(after.at(w, angle), turned_once + torch.stack(change))

    changes = LearnedResidual(hidden=0) + LearnedResidual(hidden=0)
    changes.attach(w, layer)
    shaken(changes)
    a, b = changes.parts
    assert_close(changes.whole(w, angle), w + a.at(w, angle) + b.at(w, angle))


def test_sums_and_chains_of_different_kinds():
    layer, angle = nn.Conv3d(2, 3, (2, 3, 3), dtype=D), {"angle": torch.tensor([0.4, 1.0], dtype=D)}
    w = layer.weight
    alone = {"rotate": Rotate(axis=0), "flip": Flip(0), "low": LowRank(2)}
    for transform in alone.values():
        transform.attach(w, layer)
    shaken(alone["low"])

    chain = Flip(0) @ Rotate(axis=0)  # they map different axes
    chain.attach(w, layer)
    assert chain.linear() is None
    assert_close(chain.at(w, angle), alone["rotate"].at(w, angle).flip(3))

    chain = Rotate(axis=0) @ Flip(0)
    chain.attach(w, layer)
    assert_close(chain.at(w, angle), alone["rotate"].at(w, angle).flip(3))

    chain = Rotate(axis=0) @ LowRank(2)
    chain.attach(w, layer)
    chain.parts[1].load_state_dict(alone["low"].state_dict())
    inner = w + alone["low"].at(w, angle)
    each = [alone["rotate"].at(v, {"angle": a[None]})[0] for v, a in zip(inner, angle["angle"], strict=True)]
    assert_close(chain.at(w, angle), torch.stack(each))

    total = Rotate(axis=0) + LowRank(2)
    total.attach(w, layer)
    total.parts[1].load_state_dict(alone["low"].state_dict())
    assert_close(total.at(w, angle), alone["rotate"].at(w, angle) + alone["low"].at(w, angle))

    changes = FilterMLP(hidden=4) + LowRank(2)
    changes.attach(w, layer)
    shaken(changes)
    a, b = changes.parts
    assert changes.is_change
    assert_close(changes.whole(w, angle), w + a.at(w, angle) + b.at(w, angle))


class Louder(FilterTransform):
    """A user's own transform, with no more than it must have."""

    def needs(self):
        return {"gain": ()}

    def at(self, weight, conditions, dtype=None):
        return (weight * conditions["gain"].reshape(-1, *[1] * weight.ndim)).to(dtype or weight.dtype)


class Shifted(Warp):
    """A user's own warp: one tap to the right, round the edge, for kernels of three columns."""

    def plan(self, kernel):
        if kernel.size[-1] != 3:
            raise ValueError(f"Shifted: the kernel must have 3 columns, got {kernel.size[-1]}")
        return super().plan(kernel)

    def matrix(self, conditions, like):
        taps = torch.arange(self.seen().taps).reshape(-1, 3).roll(1, 1).flatten()
        return torch.eye(len(taps), dtype=like.dtype)[taps][None]


def test_transforms_of_the_users_own():
    layer = nn.Conv2d(2, 3, (2, 3), dtype=D)
    w, conditions = layer.weight, {"gain": torch.tensor([0.5, 2.0], dtype=D), "c": torch.tensor([0.1, 0.7], dtype=D)}
    chain = Louder() @ Shifted()
    chain.attach(w, layer)
    assert_close(chain.at(w, conditions), torch.stack([0.5 * w.roll(1, 3), 2 * w.roll(1, 3)]))
    both = Shifted() + Louder() + LearnedResidual(condition="c")
    assert both.needs() == {"gain": (), "c": ()}
    both.attach(w, layer)
    assert_close(both.at(w, conditions), torch.stack([w.roll(1, 3) + 0.5 * w, w.roll(1, 3) + 2 * w]))
    refused = Louder() + Shifted()
    five = nn.Conv2d(2, 3, 5)
    with pytest.raises(ValueError, match="must have 3 columns, got 5"):
        refused.attach(five.weight, five)
    assert all(part.shape is None for part in (refused, *refused.parts))
    with pytest.raises(NotImplementedError, match="FilterTransform must implement at"):
        FilterTransform().at(w, {})
