"""Builds the two shared objects on the libtorch stable ABI; everything else is in pyproject.toml.

weightxform._C      csrc/module.cpp + csrc/*/cpu*.cpp, where there is a C++ compiler
weightxform._cuda   csrc/*/cuda*.cu, where there is nvcc as well

One binary serves every CPython from 3.10 (abi3) and every torch from 2.10, with or without CUDA. torch's own
BuildExtension refuses ``.cu`` files beside a CPU build of torch, so this one writes a ninja file itself.

WEIGHTXFORM_CPU=0       build nothing: all ops run on the reference
WEIGHTXFORM_CUDA=0      no CUDA kernels
WEIGHTXFORM_CUDA_ARCHS  default "80;90;100;120;80+PTX"
WEIGHTXFORM_WERROR=1    compiler warnings are errors
CXX, CUDA_HOME          which compiler, which toolkit
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_TARGET = "0x020a000000000000"  # 2.10
PYTHON_TARGET = "0x030a0000"  # 3.10
MACOS = sys.platform == "darwin"


def say(message: str) -> None:
    print(f"weightxform: {message}", file=sys.stderr, flush=True)


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def find_cxx() -> list[str] | None:
    """The C++ compiler as a command, or ``None`` where nothing can or shall be compiled."""
    if os.environ.get("WEIGHTXFORM_CPU") == "0":
        say("WEIGHTXFORM_CPU=0: no kernels are built, every op will run on the reference")
        return None
    if sys.platform == "win32":
        say("WARNING: kernels are not built on Windows, every op will run on the reference")
        return None
    if "CXX" in os.environ:
        command = shlex.split(os.environ["CXX"])
        if not command or not shutil.which(command[0]):
            sys.exit(f"weightxform: CXX must name a C++ compiler, got {os.environ['CXX']!r}")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    say("WARNING: no C++ compiler found (g++, c++, clang++, or $CXX): every op will run on the slow reference")
    return None


def find_cuda() -> Path | None:
    """The root of the CUDA toolkit."""
    if os.environ.get("WEIGHTXFORM_CUDA") == "0" or MACOS:
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which(os.path.join(home, "bin", "nvcc") if home else "nvcc")
    if nvcc is None:
        return None
    # nvcc on PATH may be a link or a wrapper script: ask it where its toolkit is.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).parent.parent).resolve()


def cuda_archs() -> list[str]:
    return os.environ.get("WEIGHTXFORM_CUDA_ARCHS", "80;90;100;120;80+PTX").split(";")


def gencode() -> str:
    flags = []
    for arch in cuda_archs():
        number = arch.removesuffix("+PTX")
        if not re.fullmatch(r"\d+[af]?", number):
            sys.exit(f'weightxform: WEIGHTXFORM_CUDA_ARCHS must be like "90;80+PTX", got {arch!r}')
        kind = "compute" if arch.endswith("+PTX") else "sm"
        flags.append(f"-gencode arch=compute_{number},code={kind}_{number}")
    return " ".join(flags)


def provenance(cxx: list[str], cuda: Path | None) -> str:
    """What the kernels are built with, for ``weightxform._C.build``."""

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    parts = [f"torch {version('torch')}", output(*cxx, "--version").splitlines()[0]]
    if cuda:
        release = re.search(r"V([\d.]+)", output(str(cuda / "bin" / "nvcc"), "--version"))
        parts.append(f"nvcc {release[1] if release else 'of unknown version'} ({' '.join(cuda_archs())})")
    return ", ".join(parts)


def build_file(files: list[str], out: Path, cxx: list[str], cuda: Path | None) -> str:
    """The ninja file that links ``files`` into the shared object ``out``; ``cuda`` where CUDA kernels are built."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("weightxform: torch must be installed to build the kernels (WEIGHTXFORM_CPU=0 builds none)")
    torch = Path(spec.submodule_search_locations[0])
    compiler = shlex.join(cxx)
    build = provenance(cxx, cuda)
    python = sysconfig.get_paths()["include"]
    if not Path(python, "Python.h").exists():
        sys.exit(f"weightxform: no Python.h in {python}: install the headers of this Python (Debian: python3-dev)")
    werror = os.environ.get("WEIGHTXFORM_WERROR") == "1"
    include = f"-isystem {torch}/include -I{ROOT}/csrc -isystem {python}"
    common = f"-O3 -std=c++17 -DTORCH_TARGET_VERSION={TORCH_TARGET} -DPy_LIMITED_API={PYTHON_TARGET} {include}"
    # Hidden: two extensions in one process must not see each other's templates. No -ffast-math and no contraction:
    # results must not depend on the compiler. The prefix maps keep build paths out of the binary.
    host = [
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-ffp-contract=off",
        f"-ffile-prefix-map={ROOT}/=",
        f"-ffile-prefix-map={torch}/include/=",
        "-Wall",
        "-Wextra",
        *(["-Werror"] if werror else []),
    ]
    if MACOS:
        link = f"-bundle -undefined dynamic_lookup -L{torch}/lib -ltorch -ltorch_cpu -lc10"
    else:
        # libtorch.so itself has no symbol that we use, but only it pulls libtorch_cuda.so into our lookup scope.
        link = f"-shared -L{torch}/lib -Wl,--no-as-needed -ltorch -Wl,--as-needed -ltorch_cpu -lc10"
        link += " -Wl,--exclude-libs,ALL -Wl,-z,relro"
    rules = []
    if any(source.endswith(".cu") for source in files):
        link += f" -L{cuda}/lib64 -L{cuda}/lib -lcudart_static -lrt -ldl -lpthread"
        nvcc = f"{cuda}/bin/nvcc -ccbin {shlex.quote(cxx[0])} {common} -DUSE_CUDA --threads 2 {gencode()}"
        nvcc += f"{' -Werror all-warnings' if werror else ''} -Xcompiler {','.join(host)}"
        rules = [
            "rule nvcc",
            f"  command = {nvcc} -MD -MF $out.d -c $in -o $out",
            "  description = nvcc $in",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    rules += [
        "rule cxx",
        f"  command = {compiler} {common} {shlex.join(host)} $define -MD -MF $out.d -c $in -o $out",
        "  description = c++ $in",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler} $in -o $out {link}",
        "  description = link $out",
    ]
    objects = []
    for source in files:
        objects.append(source.replace("/", "_") + ".o")
        rules.append(f"build {objects[-1]}: {'nvcc' if source.endswith('.cu') else 'cxx'} {ROOT / source}")
        if source == "csrc/module.cpp":
            rules.append("  define = " + shlex.quote(f'-DWEIGHTXFORM_BUILD="{build}"').replace("$", "$$"))
    return "\n".join([*rules, f"build {out}: link {' '.join(objects)}", ""])


class BuildKernels(build_ext):
    """Compiles with ninja in ``build/kernels``, so that the next build only compiles what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / "kernels" / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(build_file(ext.sources, out, CXX, CUDA))
        subprocess.run([find_ninja(), "-C", str(folder)], check=True)


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        return os.path.join(ninja.BIN_DIR, "ninja")
    found = shutil.which("ninja")
    if found is None:
        sys.exit("weightxform: ninja must be installed to build the kernels: pip install ninja")
    return found


CXX = find_cxx()
CUDA = find_cuda() if CXX else None
extensions = []
if CXX:
    cpu = ["csrc/module.cpp", *sources("csrc/*/cpu*.cpp")]
    extensions.append(Extension("weightxform._C", cpu, py_limited_api=True))
if CUDA and sources("csrc/*/cuda*.cu"):
    extensions.append(Extension("weightxform._cuda", sources("csrc/*/cuda*.cu"), py_limited_api=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
