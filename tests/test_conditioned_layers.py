"""AdaptiveRotatedConv2d and ModulatedConv2d against a loop over samples in plain torch."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from conditioned_zoo import D, rotation, turned
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import weightxform as wx
from weightxform.filter_warp.module import AdaptiveRotatedConv2d
from weightxform.modulation.module import ModulatedConv2d


class Fixed(nn.Module):
    """A router that says what it was told."""

    def __init__(self, angles, gates):
        super().__init__()
        self.angles, self.gates = angles, gates

    def forward(self, x):
        return self.angles, self.gates


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (5, 4), "stride": 2, "groups": 2, "bias": False, "padding_of_kernel": "zeros"},
        {"kernel_size": 3, "padding": "same", "dilation": (2, 1), "interpolation": "bicubic"},
    ],
)
def test_adaptive_rotation_is_a_loop(options):
    angles = torch.tensor([[0.4, -2.0], [math.pi / 2, 0.0], [3.0, 1.0]], dtype=D, requires_grad=True)
    gates = torch.rand(3, 2, dtype=D, requires_grad=True)
    layer = AdaptiveRotatedConv2d(4, 6, n_kernels=2, router=Fixed(angles, gates), dtype=D, **options)
    x = torch.randn(3, 4, 9, 10, dtype=D, requires_grad=True)
    y = layer(x)
    how = options.get("interpolation", "bilinear"), options.get("padding_of_kernel", "border")
    loop = []
    for b in range(3):
        weight = sum(
            gates[b, n] * turned(rotation(float(angles[b, n].detach())), layer.weight[n], layer.dilation, *how)
            for n in range(2)
        )
        loop.append(
            F.conv2d(x[b : b + 1], weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        )
    assert_close(y, torch.cat(loop))
    assert torch.equal(layer.angles(x), angles)
    grad, inputs = torch.randn_like(y), [x, layer.weight, gates]
    for got, expected in zip(
        torch.autograd.grad(y, inputs, grad, retain_graph=True),
        torch.autograd.grad(torch.cat(loop), inputs, grad),
        strict=True,
    ):
        assert_close(got, expected)
    (of_angles,) = torch.autograd.grad(y, angles, grad)
    assert bool((of_angles != 0).all())


@pytest.mark.parametrize("angle", [0.1, 0.5, math.pi / 4])
def test_the_kernels_turn_by_the_matrix_of_the_paper(angle):
    """Its rows for a corner and for the middle of an edge; the others are these, turned by quarters."""
    gates, angles = torch.ones(1, 1, dtype=D), torch.full((1, 1), angle, dtype=D)
    layer = AdaptiveRotatedConv2d(1, 1, 3, router=Fixed(angles, gates), dtype=D)
    w = layer.weight[0, 0, 0].flatten()
    x, y = math.cos(angle), math.sin(angle)
    a, b, c = x - y, x * y, x + y
    turned_by = layer.weights(torch.zeros(1, 1, 5, 5, dtype=D))[0, 0, 0]
    assert_close(turned_by[0, 0], a * w[0] + (1 - a) * w[1])
    assert_close(turned_by[0, 1], (x - b) * w[1] + b * w[2] + (1 - c + b) * w[4] + (y - b) * w[5])
    assert_close(turned_by[1, 1], w[4])


def test_the_router_is_its_formula():
    for max_angle in (math.radians(40), math.pi, None):
        layer = AdaptiveRotatedConv2d(4, 6, 3, n_kernels=3, max_angle=max_angle, dtype=D)
        x, r = torch.randn(5, 4, 7, 7, dtype=D), layer.router
        with torch.no_grad():
            r.angle.weight.normal_(std=3)
        mapped = F.conv2d(x, r.depthwise.weight, padding=1, groups=4)
        mapped = (mapped - mapped.mean((1, 2, 3), keepdim=True)) / mapped.var(
            (1, 2, 3), correction=0, keepdim=True
        ).add(1e-5).sqrt()
        f = mapped.clamp_min(0).mean((2, 3))
        angles, gates = layer.routes(x)
        assert_close(gates, torch.sigmoid(f @ r.gate.weight.T))
        z = f @ r.angle.weight.T
        if max_angle is None:
            assert_close(
                torch.polar(torch.ones_like(angles), angles).angle(), torch.angle(1 + z[:, :3] + 1j * z[:, 3:])
            )
            assert float(angles.detach().abs().max()) > math.pi / 2
        else:
            assert_close(angles, max_angle * z / (1 + z.abs()))
            assert float(angles.detach().abs().max()) < max_angle


def test_a_router_learns_the_angle():
    """The only thing that tells the samples apart is how they lie."""
    bars = torch.zeros(1, 1, 15, 15)
    bars[:, :, 6:9, 2:13] = 1
    x = torch.cat([bars, bars.transpose(2, 3)])
    x = x + 0.1 * torch.randn(2, 1, 15, 15)
    layer = AdaptiveRotatedConv2d(1, 1, 3, n_kernels=1, max_angle=None)
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        angle = layer.angles(x)[:, 0]
        target = torch.tensor([0.0, math.pi / 2])
        loss = (1 - (angle - target).cos()).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adaptive_rotation_in_half_types(dtype):
    layer = AdaptiveRotatedConv2d(4, 6, 3, n_kernels=2, max_angle=None)
    x = torch.randn(3, 4, 9, 9)
    expected = layer(x)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        angles, gates = layer.routes(x)
        assert y.dtype == dtype and angles.dtype == gates.dtype == torch.float32
        assert layer.weights(x).dtype == torch.float32
    assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    moved = copy.deepcopy(layer).to(dtype)
    assert_close(moved(x.to(dtype)).float(), expected, rtol=0.03, atol=0.03)
    assert moved.angles(x.to(dtype)).dtype == torch.float32


def _plain(layer, x, style):
    """StyleGAN's formula, one sample after the other."""
    s = style @ layer.affine.weight.T + layer.affine.bias
    ys = []
    for b in range(len(x)):
        weight = layer.weight * s[b][:, None, None]
        if layer.demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + layer.eps).sqrt()
        ys.append(F.conv2d(x[b : b + 1], weight, layer.bias, layer.stride, layer.padding, layer.dilation))
    return torch.cat(ys)


def _inputs(layer, dtype=D, batch=3):
    x = torch.randn(batch, layer.in_channels, 8, 9, dtype=dtype, requires_grad=True)
    return x, torch.randn(batch, layer.style_features, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("form", ["materialised", "activation", "auto"])
@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3, "padding": 1}, {"kernel_size": (2, 3), "stride": 2, "dilation": (1, 2), "bias": False}],
)
def test_modulation_is_its_formula(form, demodulate, options):
    layer = ModulatedConv2d(4, 5, style_features=6, demodulate=demodulate, form=form, eps=0.01, dtype=D, **options)
    x, style = _inputs(layer)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    y, expected = layer(x, style), _plain(layer, x, style)
    assert_close(y, expected)
    inputs, grad = [x, style, *layer.parameters()], torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        assert_close(got, wanted)


def test_modulation_prenormalized():
    """Where eps is small the norms cancel."""
    layer = ModulatedConv2d(4, 5, 3, 6, eps=1e-12, dtype=D)
    x, style = _inputs(layer)
    expected = layer(x, style)
    layer.prenormalize = "rms"
    for form in ("materialised", "activation"):
        layer.form = form
        assert_close(layer(x, style), expected)
        with torch.no_grad():
            layer.weight.mul_(1e-7)  # eps would count here
        assert_close(layer(x, style), expected)
        with torch.no_grad():
            layer.weight.mul_(1e7)


@pytest.mark.parametrize("form", ["materialised", "activation"])
def test_modulation_of_zeros_prenormalized(form):
    layer = ModulatedConv2d(4, 5, 3, 6, form=form, prenormalize="rms", bias=False, dtype=D)
    x, style = _inputs(layer)
    expected = layer(x, style)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.affine.bias.zero_()
        style[1] = 0
    y = layer(x, style)
    assert not y[:, 2].any() and not y[1].any() and expected[:, 2].all() and y[0, 0].all()
    for gradient in torch.autograd.grad(y, [x, style, layer.weight], torch.randn_like(y)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["materialised", "activation"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_modulation_in_half_types(form, dtype):
    """Styles of 3e5 and filters of 1e-6 are out of the range of float16, and what they give together is in it."""
    layer = ModulatedConv2d(32, 5, 3, 6, form=form, dtype=D)
    with torch.no_grad():
        layer.weight.mul_(1e-4)
        layer.affine.weight.mul_(1e5)
        layer.affine.bias.mul_(1e5)
    x, style = _inputs(layer)
    expected = layer(x, style)
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", dtype):
        y = single(x.float(), style.float())
    assert y.dtype == dtype
    assert_close(y.double(), expected, rtol=0.0, atol=8 * torch.finfo(dtype).eps)
    with torch.no_grad():
        layer.affine.weight.mul_(1e-3)
        layer.affine.bias.mul_(1e-3)
        single.load_state_dict(layer.state_dict())
    moved = single.to(dtype)
    expected = copy.deepcopy(moved).double()(x.to(dtype).double(), style.to(dtype).double())
    assert_close(moved(x.to(dtype), style.to(dtype)).double(), expected, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


def test_modulation_chooses_by_shape():
    wide, narrow = ModulatedConv2d(64, 64, 3, 4), ModulatedConv2d(4, 4, 3, 4)
    assert wide._form(torch.empty(8, 64, 8, 8)) == "activation"
    assert wide._form(torch.empty(1, 64, 8, 8)) == "materialised"
    assert narrow._form(torch.empty(8, 4, 64, 64)) == "materialised"


_MAKES = {
    "adaptive": lambda **o: AdaptiveRotatedConv2d(4, 6, 3, n_kernels=2, max_angle=None, **o),
    "materialised": lambda **o: ModulatedConv2d(4, 6, 3, 5, form="materialised", **o),
    "activation": lambda **o: ModulatedConv2d(4, 6, 3, 5, form="activation", prenormalize="rms", **o),
}


def _arguments(layer, batch=3, dtype=D):
    x = torch.randn(batch, 4, 7, 7, dtype=dtype)
    return (x,) if isinstance(layer, AdaptiveRotatedConv2d) else (x, torch.randn(batch, 5, dtype=dtype))


@pytest.mark.parametrize("kind", _MAKES)
def test_layers_as_modules(kind):
    layer = _MAKES[kind](dtype=D)
    arguments = _arguments(layer)
    y = layer(*arguments)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(*arguments), y)
    other = _MAKES[kind](dtype=D)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(*arguments), y)
    for b in range(3):  # no sample knows of another
        assert_close(layer(*(a[b : b + 1] for a in arguments)), y[b : b + 1])
    assert layer(*_arguments(layer, 0)).shape == (0, *y.shape[1:])
    inputs = [a.requires_grad_() for a in arguments]
    assert torch.autograd.gradcheck(layer, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", _MAKES)
def test_layers_compiled(kind):
    layer = _MAKES[kind](dtype=D)
    arguments = _arguments(layer)
    y = layer(*arguments)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(*arguments)
    assert_close(out, y)
    grad, parameters = torch.randn_like(y), list(layer.parameters())
    for got, expected in zip(
        torch.autograd.grad(out, parameters, grad), torch.autograd.grad(y, parameters, grad), strict=True
    ):
        assert_close(got, expected)


def test_inside_of_a_model_that_follows_a_condition():
    """Their kernels follow their own inputs; to turn the router alone would be of no use."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), AdaptiveRotatedConv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 1, 12, 12)
    net = wx.Conditioned(copy.deepcopy(model), wx.Rotate(), sample=x)
    assert net.names == ("0", "2")
    net(x, torch.tensor([0.3, 1.0]))
    assert wx.Conditioned(model, wx.Rotate(), layers=["1.router.*"]).names == ("1.router.depthwise",)
    for alone in (AdaptiveRotatedConv2d(4, 4, 3), ModulatedConv2d(4, 5, 3, 6)):
        with pytest.raises(ValueError, match="model has no layer with a spatial kernel"):
            wx.Conditioned(alone, wx.Rotate())


def test_arguments_are_checked():
    def raises(error, match, call):
        with pytest.raises(error, match=match):
            call()

    arc, mod = AdaptiveRotatedConv2d, ModulatedConv2d
    raises(TypeError, "AdaptiveRotatedConv2d: in_channels must be an int", lambda: arc("4", 6, 3))
    raises(ValueError, "groups must divide 4 and 6, got 4", lambda: arc(4, 6, 3, groups=4))
    raises(ValueError, "n_kernels must be at least 1", lambda: arc(4, 6, 3, n_kernels=0))
    raises(ValueError, "kernel_size must be an int or two", lambda: arc(4, 6, (3, 3, 3)))
    raises(ValueError, "padding must be an int, two of them or 'valid', got 'same'", lambda: arc(4, 6, 3, 2, "same"))
    raises(ValueError, "max_angle must be positive", lambda: arc(4, 6, 3, max_angle=-1))
    raises(TypeError, "router must be an nn.Module", lambda: arc(4, 6, 3, router=torch.relu))
    raises(ValueError, "ModulatedConv2d: form must be", lambda: mod(4, 6, 3, 5, form="fused"))
    raises(ValueError, "prenormalize must be 'rms'", lambda: mod(4, 6, 3, 5, prenormalize="max"))
    raises(ValueError, "must be None without demodulate", lambda: mod(4, 6, 3, 5, False, prenormalize="rms"))
    raises(ValueError, "eps must be positive", lambda: mod(4, 6, 3, 5, eps=0.0))

    layer, modulated, x = arc(4, 6, 3), mod(4, 6, 3, 5), torch.randn(2, 4, 8, 8)
    raises(ValueError, r"x must be \[B, 4, H, W\] on cpu", lambda: layer(x[0]))
    raises(ValueError, r"x must be \[B, 4, H, W\] on cpu", lambda: layer(x[:, :3]))
    raises(TypeError, "x must be torch.float32 as the weight is", lambda: layer(x.double()))
    raises(TypeError, "x must be a Tensor", lambda: layer([1.0]))
    raises(ValueError, r"style must be \[B, 5\]", lambda: modulated(x, torch.randn(2, 4)))
    raises(ValueError, "style must have a row for each of 2 images, got 3", lambda: modulated(x, torch.randn(3, 5)))
    wrong = arc(4, 6, 3, n_kernels=2, router=Fixed(torch.zeros(2, 2), torch.zeros(2, 1)))
    raises(ValueError, r"router must give gates of shape \[2, 2\], got \[2, 1\]", lambda: wrong(x))
