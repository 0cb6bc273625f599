"""Adapter files: the same bits in another process, or a ValueError and a model that is as it was."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file
from subspace_models import NAMES, Conv, Zoo, about, assert_refused, computed, mlp, moved, seeded, values_of
from torch import nn
from torch.testing import assert_close

import weightxform as wx
from weightxform.subspace.adapter import fingerprint

P = wx.subspace
PROJECTIONS = [
    *NAMES,
    P.OneHot(signed=False, tile=128),
    P.Sparse(nonzeros=3, columns="packed"),
    P.Fastfood("stacked", "binomial"),
    P.BlockHadamard(tile=64, columns="name"),
]


@pytest.fixture
def saved(tmp_path):
    sub = moved(wx.Subspace(seeded(Conv), 12, structure="said", extra_trainable=["norm.bias"]))
    sub.model(torch.randn(4, 2, 5, 5))
    sub.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


# round trips


@pytest.mark.parametrize("structure", ["shared", "said", "per_tensor"])
@pytest.mark.parametrize("projection", PROJECTIONS, ids=str)
def test_round_trip(projection, structure, tmp_path):
    if structure == "per_tensor" and (projection == "fastfood" or isinstance(projection, P.Fastfood)):
        with pytest.raises(ValueError, match="structure must be 'shared' or 'said' for fastfood"):
            wx.Subspace(mlp(), 7, projection, structure=structure)
        return
    sub = moved(wx.Subspace(seeded(), 7, projection, seed=-3, structure=structure))
    sub.save(tmp_path / "a")
    loaded = wx.Subspace.load(tmp_path / "a", seeded())
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)
    assert_close(loaded.coordinates, sub.coordinates, rtol=0, atol=0)
    assert type(loaded.projection) is type(sub.projection)
    for x in (sub, loaded):
        x(torch.ones(2, 6)).sum().backward()
    assert torch.equal(loaded.coordinates.grad, sub.coordinates.grad)
    if structure != "per_tensor":  # what the options came to may stand in their place
        assert {k: v for k, v in loaded.describe().items() if k not in ("columns", "K")} == {
            k: v for k, v in sub.describe().items() if k not in ("columns", "K")
        }
    loaded.save(tmp_path / "b")
    again = wx.Subspace.load(tmp_path / "b", seeded())
    assert_close(computed(again), computed(sub), rtol=0, atol=0)


@pytest.mark.parametrize("normalize", ["global", "per_tensor", "init"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_round_trip_of_normalisations_and_dtypes(normalize, dtype, tmp_path):
    sub = moved(wx.Subspace(seeded().to(dtype), 30, normalize=normalize))
    sub.save(tmp_path / "a")
    loaded = wx.Subspace.load(tmp_path / "a", seeded().to(dtype))
    assert loaded.coordinates.dtype == sub.coordinates.dtype
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [P.Dense, P.Learned])
def test_round_trip_of_stored_bases(kind, tmp_path):
    """Learned ones are in the file, dense ones are given again."""
    basis = torch.randn(103, 4)
    sub = moved(wx.Subspace(seeded(), 4, kind(basis)))
    sub.save(tmp_path / "a")
    assert ("basis" in load_file(tmp_path / "a")) == (kind is P.Learned)
    if kind is P.Dense:
        assert_refused(tmp_path / "a", seeded(), "give its matrix as basis=")
        assert_refused(tmp_path / "a", seeded(), "another basis", basis=basis + 1)
        assert_refused(tmp_path / "a", seeded(), "another basis", basis=basis[:-1])
        assert_refused(tmp_path / "a", seeded(), "basis must be a Tensor, got list", TypeError, basis=[1])
    else:
        assert_refused(tmp_path / "a", seeded(), "basis is for wx.subspace.Dense only", basis=basis)
    loaded = wx.Subspace.load(tmp_path / "a", seeded(), basis=basis if kind is P.Dense else None)
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)


def test_stored_basis_and_another_order_of_registration(tmp_path):
    """Its rows are those of the model that was trained, whatever the order in the one that loads."""

    class Pair(nn.Module):
        def __init__(self, order):
            super().__init__()
            torch.manual_seed(0)
            layers = {"a": nn.Linear(3, 2), "b": nn.Linear(2, 3)}
            for name in order:
                self.add_module(name, layers[name])

    sub = moved(wx.Subspace(Pair("ab"), 4, P.Learned(torch.randn(17, 4))))
    sub.save(tmp_path / "a")
    loaded = wx.Subspace.load(tmp_path / "a", Pair("ba"))
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)


def test_buffers_and_extra_trainables(saved):
    sub = moved(wx.Subspace(seeded(Conv), 12, structure="said", extra_trainable=["norm.bias"]))
    sub.model(torch.randn(3, 2, 5, 5) + 4)
    with torch.no_grad():
        sub.model.norm.bias.fill_(0.25)
    sub.save(saved)
    x = torch.randn(2, 2, 5, 5)
    loaded = wx.Subspace.load(saved, seeded(Conv))
    assert_close(values_of(loaded), values_of(sub), rtol=0, atol=0)
    assert torch.equal(loaded.eval()(x), sub.eval()(x))
    assert loaded.extra_names == ("norm.bias",) and loaded.model.norm.bias.requires_grad
    assert not wx.raw(loaded.model.norm).requires_grad


def test_redrawn(tmp_path):
    """theta0 is then what was folded into it: the checkpoint that goes with the file."""
    sub = wx.Subspace(seeded(), 7, "one_hot", redraw="step")
    for _ in range(3):
        sub(torch.ones(1, 6)).sum().backward()
        torch.optim.SGD([sub.coordinates], 0.1).step()
    moved(sub)
    sub.save(tmp_path / "a")
    assert about(tmp_path / "a")["step"] == 3
    assert_refused(tmp_path / "a", seeded(), "is for other weights")
    model = seeded()
    model.load_state_dict(sub.model.state_dict())
    loaded = wx.Subspace.load(tmp_path / "a", model)
    assert int(loaded.step) == 3
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)
    loaded(torch.ones(1, 6)).sum().backward()
    torch.optim.SGD([loaded.coordinates], 0.1).step()
    assert int(loaded.step) == 4


def test_frozen_models_and_models_with_more(tmp_path):
    """The list in the file decides: others are frozen and left alone, and P is the same."""
    sub = moved(wx.Subspace(seeded(), 9))
    sub.save(tmp_path / "a")
    larger = seeded()
    larger.add_module("aa", nn.Linear(3, 3))
    larger.requires_grad_(False)
    extra = values_of(larger.aa)
    loaded = wx.Subspace.load(tmp_path / "a", larger)
    assert set(loaded.names) == set(sub.names)
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)
    assert_close(values_of(larger.aa), extra, rtol=0, atol=0)
    assert [n for n, p in loaded.named_parameters() if p.requires_grad] == ["coordinates"]
    loaded.bake()
    assert not any(p.requires_grad for p in larger.parameters())


def test_names_without_wrappers(tmp_path):
    sub = moved(wx.Subspace(torch.compile(seeded(Zoo)), 9))
    sub.save(tmp_path / "a")
    loaded = wx.Subspace.load(tmp_path / "a", nn.DataParallel(seeded(Zoo)))
    assert_close(computed(loaded), computed(sub), rtol=0, atol=0)


def test_fresh_process(tmp_path):
    """The same logits bit for bit, from a file of a few kilobytes."""
    code = """
        import sys, torch, weightxform as wx
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))
        sub = wx.Subspace.load(sys.argv[1], model)
        print(sub(torch.linspace(-1, 1, 12).reshape(2, 6)).detach().view(torch.int32).tolist())
    """
    sub = moved(wx.Subspace(seeded(), 100))
    sub.save(tmp_path / "a")
    assert os.path.getsize(tmp_path / "a") < 4 * 100 + 2000
    command = [sys.executable, "-c", dedent(code), tmp_path / "a"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = sub(torch.linspace(-1, 1, 12).reshape(2, 6)).detach().view(torch.int32).tolist()
    assert json.loads(done.stdout) == expected


# what is in it


def test_fields_of_the_specification(saved):
    """Section 13."""
    found, model = about(saved), seeded(Conv)
    assert set(found) == {
        "format", "version", "kind", "d", "seed", "tile", "columns", "normalize", "scale", "form", "diag", "K",
        "redraw", "step", "tensors", "theta0", "structure", "basis", "order",
    }  # fmt: skip
    assert (found["format"], found["version"], found["kind"], found["d"]) == ("subspace", 1, "block_hadamard", 12)
    assert (found["tile"], found["columns"], found["scale"]) == (4096, "name", None)
    names = sorted({n for n, _ in model.named_parameters()} - {"norm.bias"})
    rows = [
        [n, list(p.shape), "float32", fingerprint(p)]
        for n, p in ((n, dict(model.named_parameters())[n]) for n in names)
    ]
    assert found["tensors"] == rows
    assert found["theta0"] == hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()
    assert set(load_file(saved)) == {
        "coordinates", "scales", "param.norm.bias",
        "buffer.norm.running_mean", "buffer.norm.running_var", "buffer.norm.num_batches_tracked",
    }  # fmt: skip


def test_resolved_options_and_scale(tmp_path):
    wx.Subspace(seeded(), 80, "sparse", normalize="init").save(tmp_path / "a")
    found = about(tmp_path / "a")
    assert (found["K"], found["columns"]) == (8, "packed")
    # fan_in of the weights is 6 and 9, vectors take that of their sibling; names in canonical order
    assert found["scale"] == [6**-0.5, 6**-0.5, 9**-0.5, 9**-0.5]
    wx.Subspace(seeded(), 7, P.Fastfood("stacked", "binomial")).save(tmp_path / "a")
    assert (about(tmp_path / "a")["form"], about(tmp_path / "a")["diag"]) == ("stacked", "binomial")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints(dtype):
    t = torch.randn(6, 50).to(dtype)
    print_of_it = fingerprint(t)
    total = 0
    bits = t.flatten().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]).tolist()
    for i, u in enumerate(bits):
        x = (u % (1 << 8 * t.element_size()) + (i + 1) * 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 % 2**64
        total += x ^ x >> 32
    assert print_of_it == f"{total % 2**64:016x}"
    assert fingerprint(t.T.contiguous().T) == print_of_it
    other = t.clone()
    other[3, 7] += 1
    swapped = t.flatten()[torch.tensor([1, 0, *range(2, 300)])]
    assert len({print_of_it, fingerprint(other), fingerprint(swapped), fingerprint(t.flatten()[:-1])}) == 4


def test_atomic_write(tmp_path, monkeypatch):
    """A write that fails leaves the old file whole and nothing beside it; permissions are those of any new file."""
    target = tmp_path / "a"
    sub = moved(wx.Subspace(seeded(), 9))
    sub.save(target)
    old = target.read_bytes()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        moved(sub, 8).save(target)
    assert target.read_bytes() == old
    assert {p.name for p in tmp_path.iterdir()} == {"a", "plain"}


@pytest.mark.parametrize("what", ["coordinates", "scales", "extra"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_saved(what, value, tmp_path):
    sub = wx.Subspace(seeded(Conv), 9, structure="said", extra_trainable=["norm.bias"])
    with torch.no_grad():
        {"coordinates": sub.coordinates, "scales": sub.scales, "extra": sub.model.norm.bias}[what][1] = value
    name = "param.norm.bias" if what == "extra" else what
    with pytest.raises(ValueError, match=f"Subspace.save: {name} must be finite"):
        sub.save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["save", "load"])
def test_missing_packages_are_named(tmp_path, monkeypatch, what):
    net = torch.nn.Linear(3, 3)
    sub = wx.Subspace(net, 2) if what == "save" else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"Subspace\.{what} needs numpy and safetensors: pip install"):
        sub.save(tmp_path / "a") if sub else wx.Subspace.load(tmp_path / "a", net)
    assert not list(tmp_path.iterdir())
