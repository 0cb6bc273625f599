"""What an adapter file must be: anything else is a ValueError, and the model is as it was."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from subspace_models import Conv, about, assert_refused, mlp, moved, seeded, state_of, values_of
from torch.testing import assert_close

import weightxform as wx
from weightxform.subspace.adapter import _digest


def rewrite(path, target, change=None, tensors=None, sha=True) -> Path:
    """The file with another description or other tensors, and a checksum that fits."""
    description, found = about(path), load_file(path)
    (change or (lambda d: None))(description)
    (tensors or (lambda t: None))(found)
    if "tensors" in description and description.get("theta0") != "keep":
        rows = json.dumps(description["tensors"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        description["theta0"] = hashlib.sha256(rows.encode()).hexdigest()
    text = json.dumps(description)
    save_file(found, target, {"weightxform": text, "sha256": _digest(text, found) if sha else "0"})
    return target


@pytest.fixture
def saved(tmp_path):
    sub = moved(wx.Subspace(seeded(Conv), 12, structure="said", extra_trainable=["norm.bias"]))
    sub.model(torch.randn(4, 2, 5, 5))
    sub.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 100, -1, -40, -200])
def test_truncated(saved, length):
    data = saved.read_bytes()
    saved.write_bytes(data[:length])
    assert_refused(saved, seeded(Conv), "a.safetensors is ")


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_one_byte_changed_anywhere(saved, data):
    """Refused; or a byte between the JSON tokens of the header, which says nothing, and then the same model."""
    good = saved.with_name("good").read_bytes() if saved.with_name("good").exists() else saved.read_bytes()
    saved.with_name("good").write_bytes(good)
    at = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != good[at]))
    saved.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
    model = seeded(Conv)
    before = state_of(model)
    try:
        loaded = wx.Subspace.load(saved, model)
    except ValueError:
        assert_close(state_of(model)[0], before[0], rtol=0, atol=0)
        assert state_of(model)[1:] == before[1:]
    else:
        assert chr(good[at]).isspace() and chr(value).isspace()
        expected = wx.Subspace.load(saved.with_name("good"), seeded(Conv))
        assert_close(values_of(loaded), values_of(expected), rtol=0, atol=0)


CHANGES = [
    (lambda d: d.update(version=2), "has version 2; this release reads version 1"),
    (lambda d: d.update(format="lora"), "is no adapter of a Subspace"),
    (lambda d: d.update(kind="hadamard"), "unknown kind of projection, 'hadamard'"),
    (lambda d: d.update(extra=1), "unknown or missing entries in its description: extra"),
    (lambda d: d.pop("tile"), "unknown or missing entries in its description: tile"),
    (lambda d: d.update(tile="4096"), "wrong 'tile'"),
    (lambda d: d.update(d=True), "wrong 'd'"),
    (lambda d: d.update(d=0), "wrong 'd'"),
    (lambda d: d.update(d=13), "13"),
    (lambda d: d.update(d=10**9), "coordinates must be 1000000000 numbers"),
    (lambda d: d.update(seed=2**70), "wrong 'seed'"),
    (lambda d: d.update(tile=100), "tile must be a power of two"),
    (lambda d: d.update(columns="x"), "columns must be"),
    (lambda d: d.update(kind="one_hot"), "wrong 'form'"),
    (lambda d: d.update(kind="fastfood"), "describes no projection: Fastfood: form must be"),
    (lambda d: d.update(kind="sparse", K=0), "wrong 'K'"),
    (lambda d: d.update(kind="sparse", K=13), "nonzeros must be from 1 to dim = 12, got 13"),
    (lambda d: d.update(kind="learned"), "wrong 'order'"),
    (lambda d: d.update(normalize="x"), "unknown normalize or structure"),
    (lambda d: d.update(structure="x"), "unknown normalize or structure"),
    (lambda d: d.update(structure="shared"), "coordinates must be"),
    (lambda d: d.update(structure="per_tensor"), "coordinates must be"),
    (lambda d: d.update(normalize="init"), "wrong 'scale'"),
    (lambda d: d.update(normalize="init", scale=[1.0] * 5), "the initial scales of its tensors differ"),
    (lambda d: d.update(redraw="epoch"), "wrong 'redraw'"),
    (lambda d: d.update(step=1), "wrong 'step'"),
    (lambda d: d.update(redraw="step", step=-1), "wrong 'step'"),
    (lambda d: d.update(tensors=[]), "wrong 'tensors'"),
    (lambda d: d.update(tensors=[1]), "wrong 'tensors'"),
    (lambda d: d.update(tensors=[d["tensors"][0]] * 2), "wrong 'tensors'"),
    (lambda d: d.update(tensors=[["a"]]), "wrong 'tensors'"),
    (lambda d: d["tensors"].pop(), "scales must be 4 numbers, got float32"),
    (lambda d: d["tensors"][0].__setitem__(0, "conv.b"), "no parameter 'conv.b'"),
    (lambda d: d["tensors"][0].__setitem__(1, [5]), r"conv.bias was float32\[5\], here it is float32\[4\] on cpu"),
    (lambda d: d["tensors"][0].__setitem__(2, "float64"), r"conv.bias was float64\[4\], here"),
    (lambda d: d["tensors"][0].__setitem__(3, "0" * 16), "the values of conv.bias are not those"),
    (lambda d: d.update(order=["x"]), "wrong 'order'"),
    (lambda d: d.update(basis="0"), "wrong 'basis'"),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_another_description(saved, number):
    """With a checksum that fits: only what it says is wrong."""
    change, message = CHANGES[number]
    assert_refused(rewrite(saved, saved.with_name("b"), change), seeded(Conv), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(coordinates=t["coordinates"][:-1]), "coordinates must be 12 numbers"),
        (lambda t: t.update(coordinates=t["coordinates"] * float("nan")), "no coordinates of finite numbers"),
        (lambda t: t.update(coordinates=t["coordinates"].long()), "no coordinates of finite numbers"),
        (lambda t: t.pop("coordinates"), "no coordinates of finite numbers"),
        (lambda t: t.pop("scales"), "coordinates must be"),
        (lambda t: t.update(scales=t["scales"][:-1].clone()), "scales must be 5 numbers"),
        (lambda t: t.update({"scales": t["scales"] / 0}), "no scales of finite numbers"),
        (lambda t: t.update({"param.norm.bias": t["param.norm.bias"] / 0}), "no param.norm.bias of finite numbers"),
        (lambda t: t.update({"param.norm.bias": torch.zeros(5)}), r"parameter norm.bias is float32\[5\] on cpu in"),
        (lambda t: t.update({"param.x": torch.zeros(5)}), "no parameter 'x'"),
        (lambda t: t.update({"param.norm.weight": torch.zeros(4)}), "trains norm.weight, which is a weight of"),
        (lambda t: t.update({"buffer.x": torch.zeros(5)}), "no buffer 'x'"),
        (lambda t: t.update({"buffer.norm.running_mean": torch.zeros(5)}), "buffer norm.running_mean is float32"),
        (lambda t: t.update({"basis": torch.zeros(5)}), "basis that its kind does not take"),
        (lambda t: t.update({"code": torch.zeros(5)}), "unknown tensor 'code'"),
    ],
)  # fmt: skip
def test_other_tensors(saved, change, message):
    assert_refused(rewrite(saved, saved.with_name("b"), tensors=change), seeded(Conv), message)


def test_other_models_and_weights(saved):
    assert_refused(saved, seeded(mlp), "is for another model: this one has no parameter 'conv.bias'")
    assert_refused(saved, seeded(Conv, 1), "is for other weights: the values of conv.bias are not those")
    assert_refused(saved, seeded(Conv).double(), r"conv.bias was float32\[4\], here it is float64\[4\] on cpu")
    assert_refused(saved, seeded(Conv).half(), "here it is float16")
    changed = seeded(Conv)
    with torch.no_grad():
        changed.head.weight.view(-1)[-1].add_(1e-6)
    assert_refused(saved, changed, "the values of head.weight")
    loaded = wx.Subspace.load(saved, model := seeded(Conv))
    assert loaded.model is model
    assert_refused(saved, model, "computed already")


def test_other_files(tmp_path):
    path, marker = tmp_path / "a", tmp_path / "code was run"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    path.write_bytes(pickle.dumps(Evil()))
    assert_refused(path, seeded(), "is no safetensors file")
    torch.save(Evil(), path)
    assert_refused(path, seeded(), "is no safetensors file")
    assert not marker.exists()
    save_file({"coordinates": torch.zeros(3)}, path)
    assert_refused(path, seeded(), "is no adapter: it has no description")
    save_file({"coordinates": torch.zeros(3)}, path, {"weightxform": "{", "sha256": "0"})
    assert_refused(path, seeded(), "is damaged: its checksum is another")
    for text in ("{", "[]", "1", '{"format": "subspace"}', "null"):
        tensors = {"coordinates": torch.zeros(3)}
        save_file(tensors, path, {"weightxform": text, "sha256": _digest(text, tensors)})
        assert_refused(path, seeded(), r"no JSON|no adapter of a Subspace|has version None")
    assert_refused(tmp_path / "nowhere", seeded(), "nowhere", FileNotFoundError)
    assert_refused(tmp_path, seeded(), r"os error|irectory", OSError)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got str"):
        wx.Subspace.load(path, "model")
