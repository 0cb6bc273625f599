"""operator="conv": the norm of the convolution itself, against the matrix of the convolution written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from spectral_norm_layers import like, put, raw, transform, vectors, write
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import weightxform as wx
from weightxform.spectral_norm.conv_operator import Geometry

EXACT = {"rtol": 1e-11, "atol": 1e-12}
forward_ad = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp

# name: (module, input size)
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (7,)),
    "conv2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (3, 4, 3)),
    "no_padding": (lambda: nn.Conv2d(3, 5, 3), (6, 5)),
    "strided": (lambda: nn.Conv2d(3, 5, 3, stride=(2, 1), padding=(1, 0)), (7, 6)),
    "dilated": (lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2), (6, 5)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1), (5, 5)),
    "one_by_one": (lambda: nn.Conv2d(4, 6, 1), (3, 3)),
    "same": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (6, 5)),
    "same_even": (lambda: nn.Conv2d(3, 4, (4, 2), padding="same"), (6, 5)),
    "valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (5, 4)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (5, 6)),
    "circular_same": (lambda: nn.Conv1d(3, 4, 4, padding="same", padding_mode="circular"), (7,)),
    "reflect": (lambda: nn.Conv2d(3, 4, 5, padding=2, padding_mode="reflect"), (5, 6)),
    "replicate": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=2, padding_mode="replicate"), (4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), (5,)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2), (2, 3, 2)),
}
same_even = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, at its first one
convolution = pytest.mark.parametrize("name", CONVOLUTIONS)


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return CONVOLUTIONS[name][0]().to(dtype)


def operator(module: nn.Module, size: tuple[int, ...], weight: Tensor) -> Tensor:
    """The matrix [outputs, inputs] of the convolution, column by column from the module's own forward."""
    plain = copy.deepcopy(module)
    plain.bias = None
    plain.weight = nn.Parameter(weight.detach().clone())
    columns = torch.eye(module.in_channels * torch.Size(size).numel(), dtype=weight.dtype)
    return plain(columns.reshape(-1, module.in_channels, *size)).detach().flatten(1).T


def attached(name: str, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, wx.SpectralNorm]:
    module = make(name, dtype)
    norm = wx.SpectralNorm(operator="conv", input_size=CONVOLUTIONS[name][1], **options)
    torch.manual_seed(1)
    norm.attach(module.weight, module)
    return module, norm


@same_even
@convolution
@pytest.mark.parametrize("order", ["u_first", "v_first"])
def test_norm_of_the_convolution_is_one_by_svd(name, order):
    module, norm = attached(name, n_power_iterations=300, order=order)
    weight = norm.compute(module.weight, advance=True)
    assert float(torch.linalg.matrix_norm(operator(module, norm.input_size, weight), 2)) == pytest.approx(1, abs=1e-3)


@same_even
@convolution
def test_one_iteration_is_that_of_the_matrix(name):
    """u, v and sigma equal those of power iteration on the matrix, and so does the output without iteration."""
    module, norm = attached(name, n_power_iterations=2)
    matrix = operator(module, norm.input_size, module.weight)
    assert norm.u.shape == (matrix.shape[0],) and norm.v.shape == (matrix.shape[1],)
    u, v = norm.u.clone(), norm.v.clone()
    for _ in range(2):
        u = nn.functional.normalize(matrix @ v, dim=0)
        v = nn.functional.normalize(matrix.T @ u, dim=0)
    out = norm.compute(module.weight, advance=True)
    assert_close((norm.u, norm.v), (u, v), **EXACT)
    assert_close(out, module.weight / (u @ matrix @ v), **EXACT)
    assert_close(norm.compute(module.weight, advance=False), out, **EXACT)


@same_even
@convolution
def test_the_slope_is_the_gradient_of_sigma(name):
    module, norm = attached(name)
    plain = copy.deepcopy(module)
    plain.bias = None
    geometry = norm.geometry
    y = plain(norm.v.reshape(1, *geometry.input(module.weight)))
    assert y.shape[1:] == geometry.output(module.weight)
    (expected,) = torch.autograd.grad(y.flatten(), plain.weight, norm.u)
    assert_close(geometry.slope(module.weight.detach(), norm.u, norm.v), expected, **EXACT)


@forward_ad
@pytest.mark.parametrize("name", ["conv2d", "strided", "grouped", "same_even", "circular", "reflect", "transposed2d"])
@pytest.mark.parametrize(
    "options", [{}, {"bound": 0.7, "gain": -1.3}, {"bound": 1e3}, {"learn_gain": True, "gain": 0.4}]
)
def test_derivatives(name, options):
    module, norm = attached(name, **options)

    def weight(raw, *gain):
        return torch.func.functional_call(norm.eval(), {"gain": gain[0]} if gain else {}, (raw,))

    inputs = (module.weight.detach().clone().requires_grad_(), *norm.parameters())
    assert torch.autograd.gradcheck(weight, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(weight, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["conv2d", "transposed2d", "replicate"])
def test_training_gradient_against_autograd_of_the_formula(name):
    module, norm = attached(name, bound=0.3, gain=1.5)
    write(module, 0.3)
    out = norm.compute(module.weight, advance=True)
    g = like(out)
    (grad,) = torch.autograd.grad(out, module.weight, g)
    plain = copy.deepcopy(module)
    plain.bias = None
    y = plain(norm.v.reshape(1, *norm.geometry.input(module.weight)))
    sigma = y.flatten() @ norm.u
    expected_out = 1.5 * plain.weight / torch.clamp_min(sigma / 0.3, 1)
    (expected,) = torch.autograd.grad(expected_out, plain.weight, g)
    assert_close(out, expected_out, **EXACT)
    assert_close(grad, expected, **EXACT)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_dtypes(dtype, tolerance):
    module, norm = attached("conv2d", dtype, n_power_iterations=200)
    out = norm.compute(module.weight, advance=True)
    assert out.dtype == dtype and norm.u.dtype == torch.float32
    matrix = operator(module.double(), norm.input_size, out.double())
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=1e-3 + tolerance)
    raw = module.weight.detach().to(dtype).requires_grad_()
    weight = norm.compute(raw, advance=False)
    weight.backward(like(weight))
    double = raw.detach().double().requires_grad_()
    norm.double()
    expected = norm.compute(double, advance=False)
    expected.backward(like(weight).double())
    assert_close(raw.grad.double(), double.grad, rtol=tolerance, atol=10 * tolerance)


def test_zero_and_not_finite_weights():
    module, norm = attached("conv2d")
    before = norm.u.clone(), norm.v.clone()
    zero = torch.zeros_like(module.weight, requires_grad=True)
    out = norm.compute(zero, advance=True)
    g = like(out)
    out.backward(g)
    assert torch.equal(out, zero) and torch.equal(zero.grad, g)
    bad = module.weight.detach().clone()
    bad[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(norm.compute(bad, advance=True)).all()
    assert torch.equal(norm.u, before[0]) and torch.equal(norm.v, before[1])


def test_repeated_backwards_and_a_write_between():
    module, norm = attached("conv2d")
    out = norm.compute(module.weight, advance=True)
    g = like(out)
    (first,) = torch.autograd.grad(out, module.weight, g)
    norm.compute(module.weight, advance=True)  # the state on ctx is that of the first
    (second,) = torch.autograd.grad(out, module.weight, g)
    assert torch.equal(first, second)
    write(module)
    with pytest.raises(RuntimeError, match="written between"):
        torch.autograd.grad(out, module.weight, g)


def test_vmap_equals_a_loop():
    module, norm = attached("conv2d")
    raws = torch.stack([module.weight.detach() + 0.1 * i for i in range(3)])
    before = norm.u.clone()
    outs = torch.func.vmap(norm)(raws)
    assert torch.equal(norm.u, before)
    for member, out in zip(raws, outs, strict=True):
        assert_close(copy.deepcopy(norm)(member), out, **EXACT)


def test_in_a_model():
    """As a computed weight: trains, counts its iterations, and its convolution has norm 1 in the end."""
    module = put(make("conv2d"), "computed", operator="conv", input_size=(6, 5), n_power_iterations=3)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    for _ in range(60):
        out = module(x)
        optimizer.zero_grad()
        out.backward(like(out))
        optimizer.step()
    before = vectors(module)[0].clone()
    module.eval()
    matrix = operator(make("conv2d"), (6, 5), module.weight)
    assert torch.equal(before, vectors(module)[0])
    assert float(torch.linalg.matrix_norm(matrix, 2)) == pytest.approx(1, abs=0.02)
    twin = put(make("conv2d"), "computed", operator="conv", input_size=(6, 5))
    twin.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(twin.eval().weight, module.weight)
    assert "operator='conv'" in repr(transform(module)) and raw(module).grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # torch's own
def test_compiled_gradients_and_state_equal_eager():
    """Under inductor with vectors that have not converged: inlined maths over updated state would be wrong here."""
    results = []
    for compiled in (False, True):
        module = put(make("conv2d", torch.float32), "computed", operator="conv", input_size=(6, 5))
        run = torch.compile(module, fullgraph=True) if compiled else module
        grads = []
        for step in range(3):
            write(module, 1.0, seed=step)
            out = run(torch.ones(2, 3, 6, 5) * step - 1)
            (grad,) = torch.autograd.grad(out, raw(module), like(out))
            grads.append(grad)
        results.append((*grads, *vectors(module)))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"operator": "conv"}, ValueError, "operator='conv' needs input_size"),
        ({"operator": "fft"}, ValueError, "operator must be 'matrix' or 'conv', got 'fft'"),
        ({"input_size": (5, 5)}, ValueError, r"input_size is for operator='conv' only, got \(5, 5\)"),
        ({"operator": "conv", "input_size": 5}, TypeError, "input_size must be a sequence of ints, got 5"),
        ({"operator": "conv", "input_size": "55"}, TypeError, "input_size must be a sequence of ints, got '55'"),
        ({"operator": "conv", "input_size": (5, 0)}, ValueError, "input_size must be at least 1, got 0"),
        ({"operator": "conv", "input_size": (5, 5.0)}, TypeError, "input_size must be an int, got 5.0"),
        ({"operator": "conv", "input_size": (5, 5), "dim": 0}, ValueError, "dim has no meaning for operator='conv'"),
    ],
)
def test_options_that_make_no_sense(options, error, message):
    with pytest.raises(error, match=message):
        wx.SpectralNorm(**options)


@pytest.mark.parametrize(
    ("module", "size", "message"),
    [
        (lambda: nn.Linear(3, 4), (3,), "must be attached to the weight of a Conv1d.*got 'weight' of Linear"),
        (
            lambda: nn.Conv2d(3, 4, 3),
            (5,),
            r"input_size must have 2 entries for float32\[4, 3, 3, 3\] on cpu, got \(5,\)",
        ),
        (lambda: nn.Conv2d(3, 4, 3), (2, 5), r"must leave an output of at least 1, got \(2, 5\)"),
        (lambda: nn.Conv1d(3, 4, 5, padding=3, padding_mode="reflect"), (3,), "too small for reflect padding"),
        (lambda: nn.Conv1d(3, 4, 5, padding=3, padding_mode="circular"), (2,), "too small for circular padding"),
    ],
)
def test_modules_that_do_not_fit(module, size, message):
    module = module()
    with pytest.raises(ValueError, match=message):
        module.weight = wx.ComputedParameter(module.weight, wx.SpectralNorm(operator="conv", input_size=size))
    assert type(module.weight) is nn.Parameter and not list(module.children())


def test_under_parametrize_the_module_is_not_known():
    module = make("conv2d")
    with pytest.raises(ValueError, match=r"must be attached to the weight of a Conv1d.*got no module"):
        parametrize.register_parametrization(module, "weight", wx.SpectralNorm(operator="conv", input_size=(6, 5)))
    assert type(module.weight) is nn.Parameter


def test_the_bias_is_no_convolution():
    module = make("conv2d")
    with pytest.raises(ValueError, match="'bias' of Conv2d"):
        module.bias = wx.ComputedParameter(module.bias, wx.SpectralNorm(operator="conv", input_size=(6, 5)))


@convolution
def test_padding_and_its_adjoint(name):
    """<pad(x), y> = <x, pad'(y)>."""
    module = make(name)
    geometry = Geometry.of(module, "weight", module.weight, CONVOLUTIONS[name][1])
    x = torch.randn(1, 2, *geometry.size, dtype=torch.float64)
    padded = geometry.padded(x)
    y = torch.randn_like(padded)
    assert_close((padded * y).sum(), (x * geometry.unpadded(y)).sum(), **EXACT)
