"""The CUDA kernels, and the C++ around them, without a GPU: see host_build.py."""

import subprocess
from pathlib import Path

import pytest
import torch
from host_build import MEMORY, ORDERS, HostGPU, build_program, compile_for_host, cuda_ops, sanitized

from weightxform.registry import OPS
from weightxform.spectral_norm import reference
from weightxform.spectral_norm.op import make_inputs
from weightxform.verify import check_case, flatten, make_args


@pytest.fixture(scope="session")
def gpu() -> HostGPU:
    return HostGPU(compile_for_host())


@pytest.mark.parametrize("name", cuda_ops())
def test_every_case_in_every_dtype(gpu, name):
    gpu.order("random")
    op = OPS[name]
    results = [check_case(op, case, dtype, "cpu", gpu[name]) for case in op.cases for dtype in op.dtypes]
    assert len(results) >= 4
    assert [str(r) for r in results if not r.passed] == []


@pytest.mark.parametrize("name", cuda_ops())
def test_the_order_of_threads_and_blocks_does_not_change_a_bit(gpu, name):
    for case in OPS[name].cases:
        outputs = []
        for order in ORDERS:
            gpu.order(order)
            outputs.append(flatten(gpu[name](*make_args(OPS[name], case, torch.float32, "cpu"))))
        for other in outputs[1:]:
            assert all(map(torch.equal, outputs[0], other)), case


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("bound", [None, 0.5])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_direction_keeps_u_and_v(gpu, value, bound, v_first):
    weight, u, v = make_inputs((24, 40), 0, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    if value == 0:
        weight.zero_()
    else:
        weight[3, 5] = value
    args = weight, u, v, None, 0, 2, 1e-12, v_first, bound, None
    out, state = gpu["spectral_norm_fwd"](*args)
    assert torch.equal(state[:64], torch.cat([u, v]))
    if value != 0:
        assert not state[64].isfinite()
        assert not out.isfinite().all()
    else:
        assert torch.equal(out, weight) and state[64] == 0
        dout = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
        assert torch.equal(gpu["spectral_norm_bwd"](dout, weight, state, None, 0, bound)[0], dout)


def test_many_more_columns_and_rows_than_threads(gpu):
    gpu.order("reverse")
    for shape, dim in (((3, 40_000), 0), ((40_000, 3), 0), ((50, 3, 130), 1), ((2, 700, 65), 1)):
        weight, u, v = make_inputs(shape, dim, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
        args = weight, u, v, None, dim, 1, 1e-12, False, None, None
        out, state = gpu["spectral_norm_fwd"](*args)
        exact, exact_state = reference.forward(weight.double(), u.double(), v.double(), *args[3:])
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: torch.zeros(23)}, "u must have"),
        ({2: torch.zeros(41)}, "v must have"),
        ({1: torch.zeros(24, dtype=torch.float64)}, "u must have"),
        ({3: torch.zeros(2)}, "gain must hold one number"),
        ({4: 2}, "dim is out of range"),
        ({5: -1}, "n_iter must not be negative"),
        ({0: torch.zeros(24, 40, dtype=torch.int32)}, "weights must be float64, float32, bfloat16 or float16"),
        ({9: torch.int32}, "out_dtype must be"),
    ],
)
def test_arguments_that_would_read_out_of_bounds_are_refused(gpu, change, message):
    weight, u, v = make_inputs((24, 40), 0, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    args = [weight, u, v, None, 0, 1, 1e-12, False, None, None]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(RuntimeError, match=message):
        gpu["spectral_norm_fwd"](*args)


def test_every_case_under_address_and_undefined_behaviour_sanitizers():
    done = sanitized(MEMORY, "cases", "bfloat16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cases ran" in done.stdout


@pytest.fixture(scope="session")
def faults() -> Path:
    return build_program("faults", *MEMORY)


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("divergent", "a barrier or shuffle that some thread does not reach"),
        ("part_of_a_warp", "a barrier or shuffle that some thread does not reach"),
        ("two_barriers", "threads are at different barriers"),
        ("not_in_the_mask", "a shuffle reads from a lane that is not in its mask"),
        ("part_of_a_block", "a grid sync that some thread of the block does not reach"),
        ("part_of_the_grid", "a grid sync that some block does not reach"),
        ("not_cooperative", "a grid sync in a launch that is not cooperative"),
        ("too_many_blocks", "a cooperative launch of 5 blocks where 4 are resident together"),
        ("too_much_shared_memory", "65537 bytes of shared memory of 65536"),
        ("shared_memory_unasked", "a kernel that resident_blocks() was not asked about"),
        ("no_blocks", "a grid must have at least one block"),
        ("past_the_end", "heap-buffer-overflow"),
        ("past_the_shared_memory", "heap-buffer-overflow"),
    ],
)
def test_planted_faults_are_reported(faults, fault, report):
    done = subprocess.run([faults, fault], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert report in done.stderr


@pytest.mark.parametrize("fault", ["missing_barrier", "missing_grid_sync", "never_written"])
def test_planted_faults_that_show_in_the_results(faults, fault):
    """In another order of threads or blocks, or as NaN in exactly those elements that nobody wrote."""
    done = subprocess.run([faults, fault], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr


def test_correct_kernels_are_not_reported(faults):
    done = subprocess.run([faults, "correct"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
