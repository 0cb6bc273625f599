"""Warps of filters against other ways to the same numbers: rot90, grid_sample, permutations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conditioned_zoo import D, attached, conv, rotation, shaken, turned
from torch import nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.conditioned import (
    Affine,
    FilterMLP,
    Flip,
    Learned,
    LearnedResidual,
    LowRank,
    Permute,
    Rotate,
    Scale,
    Shear,
    Steerable,
)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("kernel", [3, 4, (5, 2)])
def test_geometry_is_grid_sample(interpolation, padding, kernel):
    layer = nn.Conv2d(2, 3, kernel, dtype=D)
    options = {"interpolation": interpolation, "padding": padding}
    affine = torch.tensor([[0.9, 0.3, 0.2], [-0.2, 1.2, -0.4]], dtype=D)
    two = torch.tensor([0.7, 1.4], dtype=D)
    cases = [
        (Rotate(**options), {"angle": torch.tensor([2.1], dtype=D)}, rotation(2.1)),
        (Scale(**options), {"scale": torch.tensor([1.3], dtype=D)}, torch.eye(2, 3, dtype=D) / 1.3),
        (Scale(isotropic=False, **options), {"scale": two[None]}, torch.eye(2, 3, dtype=D) / two[:, None]),
        (Shear(**options), {"shear": two[None]}, torch.tensor([[1, 0.7, 0], [1.4, 1, 0]], dtype=D)),
        (Affine(**options), {"matrix": affine[None]}, affine),
    ]
    for transform, condition, t in cases:
        transform.attach(layer.weight, layer)
        expected = turned(t, layer.weight, (1, 1), interpolation, padding)
        assert_close(transform.at(layer.weight, condition), expected[None], msg=lambda m, t=transform: f"{t}: {m}")


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(3, 2, 4), nn.Conv2d(2, 3, 1)])
def test_quarter_turns_are_rot90(layer):
    transform = Rotate()
    transform.attach(layer.weight, layer)
    quarters = torch.arange(-2, 5)
    at = transform.at(layer.weight, {"angle": quarters * (math.pi / 2)})
    assert_close(at, torch.stack([layer.weight.rot90(int(k), (2, 3)) for k in quarters]), rtol=0, atol=1e-6)


def test_a_turned_kernel_sees_a_turned_image():
    x, layer = torch.randn(1, 2, 12, 12, dtype=D), conv(stride=1)
    transform = Rotate()
    transform.attach(layer.weight, layer)
    (weight,) = transform.at(layer.weight, {"angle": torch.tensor([math.pi / 2], dtype=D)})
    seen = nn.functional.conv2d(x.rot90(1, (2, 3)), weight, layer.bias)
    assert_close(seen, layer(x).rot90(1, (2, 3)))


def test_dilated_taps_turn_as_they_lie():
    layer = nn.Conv2d(2, 3, (3, 5), dilation=(3, 2), dtype=D)
    transform = Rotate()
    transform.attach(layer.weight, layer)
    at = transform.at(layer.weight, {"angle": torch.tensor([0.4], dtype=D)})
    assert_close(at[0], turned(rotation(0.4), layer.weight, (3, 2)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plane_of_three_axes(axis):
    layer = nn.Conv3d(2, 3, (3, 4, 5), dilation=(1, 2, 3), dtype=D)
    plane = [d for d in range(3) if d != axis]
    transform = Rotate(axis=axis)
    transform.attach(layer.weight, layer)
    (at,) = transform.at(layer.weight, {"angle": torch.tensor([0.7], dtype=D)})
    distances = tuple(layer.dilation[d] for d in plane)
    for i in range(layer.kernel_size[axis]):
        expected = turned(rotation(0.7), layer.weight.select(2 + axis, i), distances)
        assert_close(at.select(2 + axis, i), expected)
    if axis == 0:
        cube = nn.Conv3d(2, 3, 3, dtype=D)
        quarter = Rotate(axis=0)
        quarter.attach(cube.weight, cube)
        (at,) = quarter.at(cube.weight, {"angle": torch.tensor([math.pi / 2], dtype=D)})
        assert_close(at, cube.weight.rot90(1, (3, 4)))


def test_scaling_one_and_three_axes():
    line = nn.Conv1d(1, 1, 5, dtype=D)
    transform = Scale()
    transform.attach(line.weight, line)
    at = transform.at(line.weight, {"scale": torch.tensor([2.0, 0.5], dtype=D)})[:, 0, 0]
    a, b, c, d, e = line.weight[0, 0]
    assert_close(at[0], torch.stack([b, (b + c) / 2, c, (c + d) / 2, d]))
    assert_close(at[1], torch.stack([a * 0, a, c, e, e * 0]))

    cube = nn.Conv3d(2, 1, (3, 2, 4), dtype=D)
    transform = Scale(padding="border")
    transform.attach(cube.weight, cube)
    grid = nn.functional.affine_grid(torch.eye(3, 4, dtype=D)[None] / 1.4, (1, 1, 3, 2, 4), align_corners=True)
    expected = nn.functional.grid_sample(cube.weight, grid, padding_mode="border", align_corners=True)
    assert_close(transform.at(cube.weight, {"scale": torch.tensor([1.4], dtype=D)})[0], expected)


def test_flip():
    layer = nn.Conv3d(2, 3, (2, 3, 4), dtype=torch.float16)
    for axis in (0, 1, 2, -1):
        transform = Flip(axis)
        transform.attach(layer.weight, layer)
        assert torch.equal(transform.at(layer.weight, {})[0], layer.weight.flip(axis % 3 + 2))
    line = nn.Conv1d(2, 3, 4, dtype=D)
    transform = Flip(0, condition="c")
    transform.attach(line.weight, line)
    at = transform.at(line.weight, {"c": torch.tensor([0.0, 0.25, 1.0], dtype=D)})
    assert torch.equal(at[0], line.weight) and torch.equal(at[2], line.weight.flip(2))
    assert_close(at[1], 0.75 * line.weight + 0.25 * line.weight.flip(2))


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16, torch.float16])
def test_permutations_are_exact(dtype):
    layer = nn.Conv2d(2, 3, 3, dtype=dtype)
    w = layer.weight

    def at(group, index, **options):
        transform = Permute(group, **options)
        transform.attach(w, layer)
        return transform.at(w, {"index": torch.tensor(index)})

    for k, out in enumerate(at("p4", [0, 1, 2, 3])):
        assert torch.equal(out, w.rot90(k, (2, 3)))
    for k, out in enumerate(at("p4m", list(range(8)))):
        assert torch.equal(out, (w.flip(3) if k >= 4 else w).rot90(k % 4, (2, 3)))
    eighths = at("orn8", list(range(8)))
    for k in range(4):
        assert torch.equal(eighths[2 * k], w.rot90(k, (2, 3)))
    first = eighths[1].flatten(2)  # the upper left tap goes to the middle of the left, and so on
    assert torch.equal(first, w.flatten(2)[:, :, [1, 2, 5, 0, 4, 8, 3, 6, 7]])
    table = torch.tensor([[8, 7, 6, 5, 4, 3, 2, 1, 0], [0, 2, 1, 3, 4, 5, 6, 8, 7]])
    assert torch.equal(at(table, [1])[0].flatten(2), w.flatten(2)[:, :, table[1]])


def test_an_eighth_turn_eight_times_is_none():
    layer = conv()
    transform = Permute("orn8") @ Permute("orn8") @ Permute("orn8", condition="last")
    transform.attach(layer.weight, layer)
    index = {"index": torch.tensor([1, 3, 2]), "last": torch.tensor([6, 2, 4])}
    assert torch.equal(transform.at(layer.weight, index), layer.weight.expand(3, -1, -1, -1, -1))


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


def test_its_own_angle_learns():
    target = nn.Conv2d(3, 4, 5)
    layer = nn.Conv2d(3, 4, 5)
    layer.load_state_dict(target.state_dict())
    layer.weight.requires_grad_(False)
    layer.weight = wx.ComputedParameter(layer.weight, Rotate(angle=nn.Parameter(torch.tensor(0.1))))
    turn = Rotate()
    turn.attach(target.weight, target)
    with torch.no_grad():
        target.weight.copy_(turn.at(target.weight, {"angle": torch.tensor([0.45])})[0])
    x = torch.randn(2, 3, 9, 9)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - target(x)).square().mean().backward()
        optimizer.step()
    angle = layer.weight_transform.angle.detach()
    assert abs(float(angle) - 0.45) < 0.02
    assert "weight_transform.angle" in layer.state_dict()


def test_its_own_numbers():
    layer, two = conv(), torch.tensor([0.7, 1.2])
    theta = torch.tensor([[1.0, 0.2, 0.1], [0.0, 0.9, 0.0]], dtype=D)
    own = [
        (Rotate(0.3), Rotate(), {"angle": torch.tensor([0.3], dtype=D)}),
        (Scale(two, isotropic=False), Scale(isotropic=False), {"scale": two[None]}),
        (Shear(two), Shear(), {"shear": two[None]}),
        (Affine(theta), Affine(), {"matrix": theta[None]}),
        (Steerable(0.3), Steerable(), {"angle": torch.tensor([0.3])}),
    ]
    for mine, other, conditions in own:
        mine.attach(layer.weight, layer)
        other.attach(layer.weight, layer)
        assert mine.needs() == {} and set(other.needs()) == set(conditions)
        expected = other.at(layer.weight, {n: c.float() for n, c in conditions.items()})
        assert_close(mine.at(layer.weight, {}), expected, rtol=1e-6, atol=1e-7)


def _raises(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_arguments_are_checked():
    _raises(TypeError, "Rotate: angle must be a number", lambda: Rotate("fast"))
    _raises(ValueError, r"Rotate: angle must be a number or a 0-dim Tensor", lambda: Rotate(torch.zeros(2)))
    _raises(TypeError, r"Rotate: angle must be float64", lambda: Rotate(torch.tensor(1)))
    _raises(TypeError, "Rotate: condition must be the name", lambda: Rotate(condition=3))
    _raises(ValueError, "Rotate: interpolation must be", lambda: Rotate(interpolation="nearest"))
    _raises(ValueError, "Rotate: padding must be", lambda: Rotate(padding="wrap"))
    _raises(ValueError, "Rotate: axis must be None, 0, 1 or 2", lambda: Rotate(axis=3))
    _raises(ValueError, "Scale: scale must be positive", lambda: Scale(-1.0))
    _raises(TypeError, "Scale: isotropic must be a bool", lambda: Scale(isotropic=1))
    _raises(TypeError, r"Shear: shear must be a Tensor \[2\] or None", lambda: Shear(0.3))
    _raises(ValueError, r"Affine: matrix must be a Tensor \[2, 3\]", lambda: Affine(torch.eye(2)))
    _raises(TypeError, "Flip: axis must be an int", lambda: Flip("x"))
    _raises(ValueError, "Flip: axis must be in", lambda: Flip(3))
    _raises(ValueError, "Permute: group must be 'p4'", lambda: Permute("p6"))
    _raises(TypeError, "Permute: group must be an int64 table", lambda: Permute(torch.zeros(2, 9)))
    _raises(ValueError, "row 1 is", lambda: Permute(torch.tensor([[0, 1], [1, 1]])))
    _raises(ValueError, "Steerable: residual must be", lambda: Steerable(residual="lost"))
    _raises(ValueError, "Learned: init must be 'rotate'", lambda: Learned(init="shear"))
    _raises(
        ValueError, "init must be 'identity' where harmonics is None", lambda: Learned(harmonics=None, init="rotate")
    )
    _raises(ValueError, "size must be None where harmonics", lambda: LearnedResidual(size=3))
    _raises(TypeError, "LearnedResidual: condition must be the name", lambda: LearnedResidual(condition=1))
    _raises(TypeError, "unsupported operand", lambda: Rotate() + 1)


def test_kernels_that_do_not_fit():
    line, plane, cube = nn.Conv1d(2, 3, 3), nn.Conv2d(2, 3, (3, 2)), nn.Conv3d(2, 3, 3)
    refused = [
        (Rotate(), line, "must have two or three axes"),
        (Rotate(), cube, "axis must be 0, 1 or 2"),
        (Rotate(axis=1), plane, "axis must be None"),
        (Rotate(), nn.Linear(3, 4), "one to three spatial axes"),
        (Scale(isotropic=False), line, "isotropic must be True"),
        (Scale(isotropic=False), cube, "axis must be 0, 1 or 2"),
        (Flip(2), plane, r"axis must be in \[-2, 1\]"),
        (Permute("p4"), plane, "must be square"),
        (Permute("orn8"), nn.Conv2d(2, 3, 5), "must be 3x3"),
        (Permute("p4"), nn.Conv2d(2, 3, 3, dilation=(1, 2)), "dilated equally"),
        (Permute(torch.tensor([[1, 0]])), plane, "must have 6 columns"),
        (Learned(init=Flip(0)), plane, "must be a warp that needs one angle"),
        (Rotate() + Rotate(axis=0), plane, "axis must be None"),
    ]
    for transform, layer, match in refused:
        before = dict(transform.state_dict())
        _raises(ValueError, match, lambda t=transform, m=layer: t.attach(m.weight, m))
        assert transform.shape is None and dict(transform.state_dict()).keys() == before.keys()
        assert all(part.shape is None for part in transform.modules() if isinstance(part, Rotate))


def test_use_that_does_not_fit():
    layer = conv()
    w, angle = layer.weight, {"angle": torch.tensor([0.1], dtype=D)}
    rotate = Rotate()
    _raises(RuntimeError, "Rotate: not attached", lambda: rotate.at(w, angle))
    rotate.attach(w, layer)
    _raises(ValueError, "serves another weight already", lambda: rotate.attach(w, layer))
    _raises(ValueError, r"weight must be \[3, 2, 3, 3\], as was attached", lambda: rotate.at(w[:1], angle))
    _raises(ValueError, "conditions must have 'angle', got 'turn'", lambda: rotate.at(w, {"turn": angle["angle"]}))
    _raises(ValueError, r"condition 'angle' must be \[C\]", lambda: rotate.at(w, {"angle": torch.zeros(2, 1)}))
    _raises(ValueError, r"condition 'angle' must be \[C\]", lambda: rotate.at(w, {"angle": torch.zeros(())}))
    _raises(TypeError, "condition 'angle' must be float64", lambda: rotate.at(w, {"angle": torch.tensor([1])}))
    _raises(ValueError, "on cpu", lambda: rotate.at(w, {"angle": torch.zeros(1, device="meta")}))
    same = Rotate()
    _raises(ValueError, "in it twice", lambda: (same + same).attach(w, layer))
    clash = Rotate(condition="c") + Shear(condition="c")
    _raises(ValueError, "in different shapes", clash.needs)
    residual = LearnedResidual()
    residual.attach(w, layer)
    _raises(ValueError, "one condition, or the name", lambda: residual.at(w, {**angle, "b": angle["angle"]}))
    permute = Permute()
    permute.attach(w, layer)
    _raises(IndexError, r"must be whole, in 0 ... 3, got 4", lambda: permute.at(w, {"index": torch.tensor([1, 4])}))
    _raises(IndexError, r"must be whole, in 0 ... 3, got 1.5", lambda: permute.at(w, {"index": torch.tensor([1.5])}))
    _raises(ValueError, r"must be \[C\]", lambda: permute.at(w, {"index": torch.tensor(1)}))
    _raises(TypeError, "must be integers", lambda: permute.at(w, {"index": torch.tensor([True])}))
    plain = nn.Conv2d(2, 3, 3)
    plain.weight = wx.ComputedParameter(plain.weight, Rotate())
    _raises(RuntimeError, "Rotate needs 'angle': use it in wx.Conditioned", lambda: plain.weight)


def test_an_equal_index_as_a_number_is_the_same():
    layer = conv()
    transform = attached("permute", layer)
    whole = transform.at(layer.weight, {"index": torch.tensor([2, 5], dtype=torch.int32)})
    assert torch.equal(whole, transform.at(layer.weight, {"index": torch.tensor([2.0, 5.0])}))
