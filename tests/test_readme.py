"""What the documents show, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_python_snippets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # one writes a file
    text = (ROOT / name).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    torch.manual_seed(0)
    scope: dict[str, object] = {}
    for snippet in snippets:  # one after another, in one namespace, as a reader would type them
        exec(compile(snippet, name, "exec"), scope)


def test_first_snippet_does_what_it_says() -> None:
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippet is not None
    scope: dict = {}
    exec(compile(snippet.group(1), "README.md", "exec"), scope)
    layer = scope["layer"].eval()
    assert layer.weight.grad_fn is not None
    assert scope["wx"].raw(layer).grad.abs().sum() > 0
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.weight, 2).item(), 1.0, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_named_files_and_targets_exist(name: str) -> None:
    text = (ROOT / name).read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`([\w/]+\.(?:py|md|cpp|cu))`", text):
        assert any(ROOT.glob(f"**/{path}")), path
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
        assert (ROOT / image).exists(), image
