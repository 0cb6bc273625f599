"""What is installed: without kernels, with a broken one, from a wheel, from an sdist, in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = Path(pytest.__file__).parent.parent  # where torch and the build tools are
USE = """
import torch, weightxform as wx
weight, u, v = torch.randn(5, 7), torch.randn(5), torch.randn(7)
weight.requires_grad_()
out, u, v, sigma = wx.functional.spectral_norm(weight, u / u.norm(), v / v.norm())
out.backward(torch.randn(5, 7))
assert weight.grad.isfinite().all()
print(wx.info().kernels["_C"], "|", wx.info().serving["spectral_norm_fwd"]["cpu"][0])
"""


def python(interpreter: Path | str, code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run ``code`` in ``folder`` (which is on its path), away from this checkout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WEIGHTXFORM_", "PYTHONPATH"))}
    flags = ()
    if interpreter == sys.executable:  # an editable install of this checkout must not help: its hook is a .pth file
        flags, kept["PYTHONPATH"] = ("-S",), str(PACKAGES)
    command = [str(interpreter), *flags, "-c", code]
    return subprocess.run(command, cwd=folder, env={**kept, **environment}, capture_output=True, text=True)


def copy_of_the_package(folder: Path) -> Path:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    return shutil.copytree(ROOT / "weightxform", folder / "weightxform", ignore=ignore)


def test_without_kernels_everything_runs_on_the_reference(tmp_path):
    copy_of_the_package(tmp_path)
    done = python(sys.executable, USE, tmp_path)
    assert done.stdout == "not built | reference\n", done.stderr


def test_a_kernel_that_does_not_load_is_an_error(tmp_path):
    (copy_of_the_package(tmp_path) / "_C.abi3.so").write_bytes(b"not a shared object")
    done = python(sys.executable, "import weightxform", tmp_path)
    assert done.returncode == 1
    assert "ImportError" in done.stderr and "_C.abi3.so" in done.stderr


def test_a_cuda_library_that_does_not_load_is_an_error(tmp_path):
    (copy_of_the_package(tmp_path) / "_cuda.abi3.so").write_bytes(b"not a shared object")
    done = python(sys.executable, "import weightxform", tmp_path, WEIGHTXFORM_LOAD_CUDA="1")
    assert done.returncode == 1
    assert "_cuda.abi3.so" in done.stderr


def setup_py(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """``setup.py --name``: reads the environment, as every build does first, and builds nothing."""
    command = [sys.executable, str(folder / "setup.py"), "--name"]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_no_compiler_is_a_warning(tmp_path):
    done = setup_py(ROOT, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "WARNING: no C++ compiler found" in done.stderr and "every op will run on the slow reference" in done.stderr


def test_a_compiler_that_is_named_must_be_there():
    done = setup_py(ROOT, CXX="no-such-compiler -O2")
    assert done.returncode != 0
    assert "CXX must name a C++ compiler, got 'no-such-compiler -O2'" in done.stderr


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked sdist of this checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    ignore = shutil.ignore_patterns(
        "*.so", "__pycache__", ".git", ".venv", "build", "dist", "out", ".*_cache", "*.egg-info"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """An environment with nothing but pip, which sees torch and the build tools of this one."""
    folder = tmp_path_factory.mktemp("site")
    venv.create(folder, with_pip=True)
    packages = next(Path(folder, "lib").glob("python3*")) / "site-packages"
    shutil.rmtree(packages / "setuptools", ignore_errors=True)  # Python 3.11 brings an old one
    (packages / "this.pth").write_text(f"{PACKAGES}\n")
    return folder


def pip(site: Path, *arguments: str, **environment: str) -> None:
    command = [str(site / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-index", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_sdist_builds_a_wheel_that_works(sdist, site, tmp_path):
    for header in (ROOT / "csrc").rglob("*"):
        assert (sdist / header.relative_to(ROOT)).exists(), header
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(sdist)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "WEIGHTXFORM_CUDA": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert [n for n in archive.namelist() if n.endswith(".so")] == ["weightxform/_C.abi3.so"]
        library = archive.read("weightxform/_C.abi3.so")
    assert str(sdist).encode() not in library
    pip(site, "--force-reinstall", str(wheel))
    done = python(site / "bin" / "python", USE, tmp_path)
    assert done.stdout.startswith("loaded, built with torch") and done.stdout.endswith("| cpu\n"), done.stderr


@pytest.mark.slow
def test_an_install_without_a_compiler_works(sdist, site, tmp_path):
    pip(site, "--force-reinstall", "--no-build-isolation", str(sdist), PATH=str(tmp_path))
    done = python(site / "bin" / "python", USE, tmp_path)
    assert done.stdout == "not built | reference\n", done.stderr


@pytest.mark.slow
def test_an_editable_install_works(sdist, site, tmp_path):
    pip(site, "--force-reinstall", "--no-build-isolation", "--editable", str(sdist), WEIGHTXFORM_CUDA="0")
    assert (sdist / "weightxform" / "_C.abi3.so").exists()
    done = python(site / "bin" / "python", USE + "print(wx.__file__)", tmp_path)
    assert done.stdout.endswith(f"| cpu\n{sdist / 'weightxform' / '__init__.py'}\n"), done.stderr


@pytest.mark.slow
def test_a_kernel_that_does_not_compile_is_an_error(sdist, site, tmp_path):
    broken = shutil.copytree(sdist, tmp_path / "broken")
    (broken / "csrc" / "module.cpp").write_text("int f() { return no_such_name; }\n")
    command = [str(site / "bin" / "python"), "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run(
        [*command, str(broken)], env={**os.environ, "WEIGHTXFORM_CUDA": "0"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "no_such_name" in done.stdout + done.stderr
