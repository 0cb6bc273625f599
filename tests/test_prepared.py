"""The ops that name a group of weights by a handle, and their checks."""

from __future__ import annotations

import gc
from itertools import accumulate

import pytest
import torch
from computed_oracle import randn, unit
from repeated_models import net, run, write

import weightxform as wx
from weightxform.registry import OPS
from weightxform.spectral_norm.op import make_inputs, spectral_norm_fwd_list


def arguments(n: int = 2) -> list:
    weights = [randn(3, 4, seed=i, dtype=torch.float32) for i in range(n)]
    us = [unit(randn(3, seed=i, dtype=torch.float32)) for i in range(n)]
    vs = [unit(randn(4, seed=i, dtype=torch.float32)) for i in range(n)]
    return [weights, us, vs, [], [0] * n, [1] * n, 1e-12, False, None, None]


ops = torch.ops.weightxform
BAD = {
    "no weights": ((0, []), "must not be empty"),
    "us": ((1, []), "must be as many"),
    "gains": ((3, [torch.ones(())]), "must be as many"),
    "dims": ((4, [0]), "equally many"),
    "dim": ((4, [0, 2]), "dim is out of range"),
    "n_iter": ((5, [1, -1]), "n_iter must not be negative"),
    "out_dtype": ((9, torch.int32), "out_dtype must be"),
    "dtype": ((0, [torch.ones(3, 4), torch.ones(3, 4).double()]), "one dtype"),
    "not float": ((0, [torch.ones(3, 4, dtype=torch.int32)] * 2), "must be float64"),
    "u dtype": ((1, [torch.ones(3).double()] * 2), "u and v must be"),
    "u size": ((1, [torch.ones(4)] * 2), "u must have"),
    "v size": ((2, [torch.ones(3)] * 2), "u must have"),
}


@pytest.mark.parametrize("name", BAD)
def test_prepare_checks_its_arguments(name):
    (at, value), match = BAD[name]
    given = arguments()
    given[at] = value
    with pytest.raises(RuntimeError, match=match):
        ops.spectral_norm_prepare(*given)


def test_the_prepared_forward_and_backward_are_the_ops_and_check_their_arguments():
    given = arguments()
    state_before = [[x.clone() for x in xs] for xs in given[1:3]]
    handle = ops.spectral_norm_prepare(*given)
    outs, state = ops.spectral_norm_prepared_fwd(handle)
    expected, expected_state = spectral_norm_fwd_list(given[0], *state_before, *given[3:])
    assert all(torch.equal(a, b) for a, b in zip([*outs, state], [*expected, expected_state], strict=True))
    for i in range(2):
        assert torch.equal(state[8 * i : 8 * i + 7], torch.cat([given[1][i], given[2][i]]))
    douts = [randn(3, 4, seed=9 + i, dtype=torch.float32) for i in range(2)]
    dweights, _ = ops.spectral_norm_bwd_list(douts, given[0], state, [0, 8], [], [0, 0], None)
    got, _ = ops.spectral_norm_prepared_bwd(handle, douts, [0, 1], state, [])
    assert all(torch.equal(a, b) for a, b in zip(got, dweights, strict=True))
    into = [torch.ones(3, 4)]
    none, _ = ops.spectral_norm_prepared_bwd(handle, douts[1:], [1], state, into)
    assert none == [] and torch.equal(into[0], 1 + dweights[1])
    for bad, match in (
        ((douts, [0], state, []), "equally many"),
        (([], [], state, []), "equally many"),
        ((douts, [0, 1], state, into), "equally many"),
        ((douts, [0, 2], state, []), "which is out of range"),
        ((douts, [-1, 0], state, []), "which is out of range"),
        ((douts, [0, 1], state[1:], []), "what the forward returned"),
        ((douts, [0, 1], state.double(), []), "what the forward returned"),
        (([d[:2] for d in douts], [0, 1], state, []), "shapes of the weights"),
        ((douts[:1], [0], state, [torch.ones(3, 4).double()]), "into must have"),
        ((douts[:1], [0], state, [torch.ones(4, 3).t()]), "into must have"),
    ):
        with pytest.raises(RuntimeError, match=match):
            ops.spectral_norm_prepared_bwd(handle, *bad)
    for no_handle in (torch.ones(1), *(torch.zeros(n, dtype=torch.uint8) for n in (0, 1, 2))):
        with pytest.raises(RuntimeError, match="must be a handle"):
            ops.spectral_norm_prepared_fwd(no_handle)
    del given
    gc.collect()
    assert ops.spectral_norm_prepared_fwd(handle)[0][0].shape == (3, 4), "it holds its tensors"


def test_what_cannot_be_prepared():
    given = arguments()
    given[0][1] = torch.ones(3, 8)[:, ::2]
    assert ops.spectral_norm_prepare(*given).numel() == 0, "it would have to be copied"
    model = net()
    wx.constrain(model, wx.SpectralNorm)
    with wx.backend("reference"):
        run(model, 0), write(model, 1), run(model, 1)
    assert torch.isfinite(wx.raw(model[4]).grad).all()


def test_a_list_that_is_shared_by_threads_has_the_bits_of_one():
    """More than 2 MiB in all: below, one thread does it."""
    weights, us, vs = zip(
        *(
            make_inputs((200 + i, 190), 0, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(i))
            for i in range(16)
        ),
        strict=True,
    )
    n = len(weights)
    arguments = list(weights), list(us), list(vs), [], [0] * n, [1] * n, 1e-12, False, None, None
    douts = [torch.randn_like(w) for w in weights]
    offsets = [0, *accumulate(u.numel() + v.numel() + 1 for u, v in zip(us, vs, strict=True))][:-1]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outs, state = OPS["spectral_norm_fwd_list"](*arguments)
        grads, dgains = OPS["spectral_norm_bwd_list"](douts, list(weights), state, offsets, [], [0] * n, None)
        results.append([*outs, state, *grads, dgains])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
