"""Warps of filters against other ways to the same numbers: rot90, grid_sample, permutations by hand."""

from __future__ import annotations

import math

import pytest
import torch
from conditioned_zoo import D, attached, conv, rotation, turned
from torch import nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.conditioned import (
    Affine,
    Flip,
    Learned,
    LearnedResidual,
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
    _raises(ValueError, "Scale: scale must be positive, got nan", lambda: Scale(torch.tensor(math.nan)))
    _raises(ValueError, "Rotate: angle must be finite, got nan", lambda: Rotate(nn.Parameter(torch.tensor(math.nan))))
    _raises(ValueError, "Affine: matrix must be finite, got inf", lambda: Affine(torch.full((2, 3), math.inf)))
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
    scale = Scale()
    scale.attach(w, layer)
    zero = {"scale": torch.tensor([1.0, 0.0], dtype=D)}
    _raises(ValueError, r"condition 'scale' must be positive, got 0\.0", lambda: scale.at(w, zero))
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
    needing = wx.ComputedParameter(plain.weight, Rotate())
    _raises(ValueError, "Rotate needs 'angle': use it in wx.Conditioned", lambda: setattr(plain, "weight", needing))
    assert not wx.is_computed(plain)


def test_an_equal_index_as_a_number_is_the_same():
    layer = conv()
    transform = attached("permute", layer)
    whole = transform.at(layer.weight, {"index": torch.tensor([2, 5], dtype=torch.int32)})
    assert torch.equal(whole, transform.at(layer.weight, {"index": torch.tensor([2.0, 5.0])}))


def test_tables_come_back_from_meta():
    layer = conv()
    for transform, condition in ((Flip(0), {}), (Permute("p4m"), {"index": torch.tensor([5])})):
        transform.attach(layer.weight, layer)
        expected = transform.at(layer.weight, condition)
        transform.to("meta").to_empty(device="cpu")
        assert torch.equal(transform.at(layer.weight, condition), expected)


def test_where_its_own_numbers_are():
    layer = conv()
    with torch.device("meta"):
        parameter = Rotate(nn.Parameter(torch.zeros(())))
    with pytest.raises(ValueError, match="Rotate: angle must be on cpu as the weight is, got float32"):
        parameter.attach(layer.weight, layer)
    moved = nn.Conv2d(2, 3, 3, device="meta")
    rotate = Rotate(0.3)
    rotate.attach(moved.weight, moved)
    assert rotate.angle.is_meta


def test_vmapped_and_differentiated_by_func():
    layer, angles = conv(), torch.tensor([0.3, 1.2], dtype=D)
    rotate, permute = Rotate(), Permute()
    for transform in (rotate, permute):
        transform.attach(layer.weight, layer)

    def turned_by(angle):
        return rotate.at(layer.weight, {"angle": angle[None]})[0]

    assert_close(torch.func.vmap(turned_by)(angles), rotate.at(layer.weight, {"angle": angles}))
    forward, backward = torch.func.jacfwd(turned_by)(angles[0]), torch.func.jacrev(turned_by)(angles[0])
    assert_close(forward, backward)
    indices = torch.tensor([1, 2])
    each = torch.func.vmap(lambda i: permute.at(layer.weight, {"index": i[None]})[0])(indices)
    assert torch.equal(each, permute.at(layer.weight, {"index": indices}))
