"""Spectral normalization on the host GPU, every way through its phases: the same bits, on any device, in any order.

The library is built with small tiles, so that small weights take the paths of large ones. Which path is taken is read
from the environment once: every way is a process of its own (``test_spectral_norm_paths.py LIBRARY OUT DEVICE``).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_build import HostGPU, compile_for_host

from weightxform.numerics import FLOAT_DTYPES, opmath, relative_error
from weightxform.spectral_norm import reference
from weightxform.spectral_norm.op import make_inputs, state_size

SMALL = ("-DWX_SN_THREADS=64", "-DWX_SN_TILE_BYTES=4096")

# shape, dim, layout. In elements, a batch is about 1000 float32.
MEMBERS = [
    ((31, 33), 0, "contiguous"),  # one tile
    ((120, 96), 0, "contiguous"),
    ((61, 97), 0, "slice"),  # rows that do not begin on 16 bytes
    ((40, 900), 0, "contiguous"),  # a row is nearly a batch
    ((9, 2500), 0, "contiguous"),  # a row is more than a batch
    ((3, 9001), 0, "contiguous"),
    ((2100, 3), 0, "contiguous"),
    ((5000,), 0, "contiguous"),
    ((90, 70), 1, "contiguous"),  # the transposed matrix
    ((24, 20, 3, 3), 0, "channels_last"),
    ((24, 20, 3, 3), 1, "contiguous"),  # a tile has several slabs
    ((4, 90, 5, 5), 1, "contiguous"),  # a slab has several tiles
    ((2, 3, 2500), 1, "contiguous"),
    ((24, 20, 3, 3), 1, "channels_last"),
    ((12, 14, 5, 9), 2, "contiguous"),
    ((12, 14, 5, 9), 2, "channels_last"),  # no layout of the kernels: a copy
    ((1, 7000), 0, "contiguous"),
    ((0, 5), 0, "contiguous"),
]
WAYS = {  # WEIGHTXFORM_CUDA_PATH, (SMs, bytes of shared memory, cooperative launches)
    "phases": ("phases", (4, 64 << 10, 1)),
    "no cooperative launch": ("", (4, 64 << 10, 0)),
    "all on chip": ("", (7, 1 << 20, 1)),
    "part of it on chip": ("resident", (3, 64 << 10, 1)),
    "little on chip": ("resident", (2, 36 << 10, 1)),
}


def arguments(dtype: torch.dtype, v_first: bool, n_iter: int, magnitude: float = 1.0) -> tuple:
    generator = torch.Generator().manual_seed(0)
    inputs = [make_inputs(shape, dim, dtype, torch.device("cpu"), generator, layout) for shape, dim, layout in MEMBERS]
    weights, us, vs = (list(x) for x in zip(*inputs, strict=True))
    if n_iter == 0:  # u'Wv of vectors that no iteration has seen cancels: nobody could compute it exactly
        for i, (w, u, v) in enumerate(inputs):
            warm = reference.iterate(
                reference.as_matrix(w.double(), MEMBERS[i][1]), u.double(), v.double(), 3, 0, False
            )
            us[i], vs[i] = (x.to(u.dtype) for x in warm)
    weights = [magnitude * w if magnitude != 1 else w for w in weights]
    n_iters = [n_iter + i % 2 if n_iter else 0 for i in range(len(MEMBERS))]
    gains = [torch.randn((), generator=generator, dtype=torch.float64).to(opmath(dtype)) for _ in MEMBERS]
    eps = 1e-12 if magnitude == 1 else 1e-300
    return weights, us, vs, gains, [dim for _, dim, _ in MEMBERS], n_iters, eps, v_first, None, None


def upstream(weights: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(w.shape, generator=generator, dtype=torch.float64) + w.double()).to(dtype) for w in weights]


def backward_arguments(args: tuple, state: torch.Tensor, dtype: torch.dtype) -> tuple:
    offsets = torch.tensor([0] + [state_size(w, d) for w, d in zip(args[0], args[4], strict=True)])
    return upstream(args[0], dtype), args[0], state, offsets.cumsum(0)[:-1].tolist(), args[3], args[4], None


CALLS = [(dtype, v_first, n) for dtype in FLOAT_DTYPES for v_first in (False, True) for n in (0, 1, 3)]


def run(gpu: HostGPU) -> dict:
    results = {}
    for dtype, v_first, n_iter in CALLS:
        args = arguments(dtype, v_first, n_iter)
        outs, state = gpu["spectral_norm_fwd_list"](*args)
        alone = gpu["spectral_norm_state_list"](*args[:3], *args[4:8])
        backward = gpu["spectral_norm_bwd_list"](*backward_arguments(args, state, dtype))
        results[dtype, v_first, n_iter] = [*outs, state, alone, *backward[0], backward[1]]
        assert [t.stride() for t in outs] == [torch.empty_like(w).stride() for w in args[0]]
    args = arguments(torch.float32, False, 1)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        results["out", dtype] = gpu["spectral_norm_fwd_list"](*args[:9], dtype)[0]
        state = gpu["spectral_norm_fwd_list"](*args)[1]
        results["dout", dtype] = gpu["spectral_norm_bwd_list"](*backward_arguments(args, state, dtype))[0]
    for magnitude in (1e-25, 1e-15, 1e15, 1e30):
        for dtype in (torch.float32, torch.float64):
            for v_first in (False, True):
                args = arguments(dtype, v_first, 2, magnitude)
                results[magnitude, dtype, v_first] = [*gpu["spectral_norm_fwd_list"](*args)[0]]
    many = arguments(torch.float32, False, 1)
    many = [x * 20 if isinstance(x, list) else x for x in many]  # more members than one argument takes
    results["many"] = [*gpu["spectral_norm_fwd_list"](*many)[0]]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder, library = tmp_path_factory.mktemp("paths"), compile_for_host(*SMALL, rooms="spectral_norm")
    found = {}
    for i, (name, (path, device)) in enumerate(WAYS.items()):
        out = folder / f"{i}.pt"
        command = [sys.executable, __file__, str(library), str(out), json.dumps(device)]
        env = {**os.environ, "WEIGHTXFORM_CUDA_PATH": path}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = torch.load(out)
    return found


def test_each_way_is_the_one_that_was_asked_for(results):
    waited = {name: "grid_sync" in ways["barriers"] for name, ways in results.items()}
    assert waited == {name: "chip" in name for name in WAYS}


@pytest.mark.parametrize("way", [name for name in WAYS if name != "phases"])
def test_every_way_gives_the_same_bits(results, way):
    expected, found = results["phases"], results[way]
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"barriers"}:
        for i, (a, b) in enumerate(zip(expected[key], found[key], strict=True)):
            assert torch.equal(a, b), (key, i)


@pytest.mark.parametrize(("dtype", "v_first", "n_iter"), CALLS, ids=str)
def test_as_exact_as_the_reference(results, dtype, v_first, n_iter):
    found = results["phases"][dtype, v_first, n_iter]
    measured = torch.float32 if dtype == torch.float64 else dtype
    factor = 2 if dtype != torch.float64 else 3 * torch.finfo(dtype).eps / torch.finfo(measured).eps
    n = len(MEMBERS)
    args = arguments(dtype, v_first, n_iter)
    wide = double(args)
    outs, states = reference.forward_list(*wide)
    assert torch.equal(found[n], found[n + 1])
    backward = reference.backward_list(*double(backward_arguments(args, found[n], dtype)))
    own = arguments(measured, v_first, n_iter)
    own_exact, own_states = reference.forward_list(*double(own))
    own_outs, own_state = reference.forward_list(*own)
    own_args = backward_arguments(own, found[n].to(opmath(measured)), measured)
    own_backward, own_backward_exact = reference.backward_list(*own_args), reference.backward_list(*double(own_args))
    expected = [*outs, states, *backward[0], backward[1]]
    rounded = [*own_outs, own_state, *own_backward[0], own_backward[1]]
    exact = [*own_exact, own_states, *own_backward_exact[0], own_backward_exact[1]]
    actual = [*found[: n + 1], *found[n + 2 :]]
    errors = list(map(relative_error, rounded, exact))
    if dtype == torch.float64:  # the oracle has an error, too, and not where float32 has it: the largest of the list
        errors = [max(errors)] * len(errors)
    for i, (a, e, error) in enumerate(zip(actual, expected, errors, strict=True)):
        bound = factor * error + 2 * torch.finfo(a.dtype).eps
        assert relative_error(a, e) <= bound, (i, relative_error(a, e), bound)


def double(args: tuple) -> list:
    def convert(x):
        return [t.double() if isinstance(t, torch.Tensor) else t for t in x] if isinstance(x, list) else x

    return [x.double() if isinstance(x, torch.Tensor) else convert(x) for x in args]


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("magnitude", [1e-25, 1e-15, 1e15, 1e30])
def test_weights_of_any_scale(results, magnitude, dtype, v_first):
    outs = results["phases"][magnitude, dtype, v_first]
    expected = reference.forward_list(*double(arguments(dtype, v_first, 2, magnitude)))[0]
    for out, exact in zip(outs, expected, strict=True):
        assert relative_error(out, exact) <= 1e-5


def test_other_dtypes_and_longer_lists_are_the_same_numbers(results):
    found = results["phases"]
    plain = found[torch.float32, False, 1][: len(MEMBERS)]
    for out, wide in zip(plain, found["out", torch.float64], strict=True):
        assert torch.equal(out, wide.float())
    for dtype in (torch.bfloat16, torch.float16):
        for out, half in zip(plain, found["out", dtype], strict=True):
            assert torch.equal(out.to(dtype), half)
    for out, again in zip(plain * 20, found["many"], strict=True):
        assert torch.equal(out, again)


if __name__ == "__main__":
    gpu = HostGPU(Path(sys.argv[1]))
    gpu.device(*json.loads(sys.argv[3]))
    gpu.order("random")
    gpu.drop(None)
    found = run(gpu)
    found["barriers"] = set(gpu.barriers().values())
    torch.save(found, sys.argv[2])
