"""CI: every Triton kernel compiles ahead of time for every architecture, without spills, within its budgets.

Needs no GPU. sm_90 gets every kind of tile for float32 and bfloat16 weights; the other dtypes and architectures get the
kinds that use most. Registers are those that cuobjdump reports, spills those of ptxas; Triton brings both.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())  # what is compiled here is compiled anew

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weightxform.filter_mlp import triton_kernels as filter_mlp
from weightxform.filter_mlp import triton_launch as filter_mlp_launch
from weightxform.filter_warp import triton_kernels as filter_warp
from weightxform.filter_warp import triton_launch as filter_warp_launch
from weightxform.modulation import triton_kernels as modulation
from weightxform.modulation import triton_launch as modulation_launch
from weightxform.numerics import FLOAT_DTYPES, opmath
from weightxform.spectral_norm import triton_backward, triton_kernels, triton_launch, triton_plan
from weightxform.subspace import (
    triton_dense,
    triton_entries,
    triton_entries_launch,
    triton_fastfood,
    triton_hadamard,
    triton_one_hot,
)
from weightxform.subspace import triton_sums as subspace_sums
from weightxform.triton_common import kernels as common
from weightxform.triton_common import launch as common_launch
from weightxform.triton_common.tables import type_of
from weightxform.warp_matrix import triton_kernels as warp_matrix
from weightxform.warp_matrix import triton_launch as warp_matrix_launch

ARCHITECTURES = (80, 90, 100, 120)
SHARED = 48 << 10  # what every block may have without asking; some GPUs have no more than 99 KiB for a whole SM
REGISTERS = 255
BIN = Path(nvidia.__file__).parent / "bin"
TL = triton_kernels.tl

# (name, kernel, pointer arguments, constants, warps, architecture)
Build = tuple[str, Any, dict[str, str], dict[str, Any], int, int]


def pointer(dtype: torch.dtype) -> str:
    return {torch.float64: "*fp64", torch.float32: "*fp32"}[dtype]


def product_kinds(dtype: torch.dtype) -> list[int]:
    tile, wide = triton_plan.TILE.get(dtype, triton_plan.DEFAULT_TILE), triton_kernels.WIDE.value
    rows = [bucket for bucket in range(wide) if 64 << bucket <= tile]
    columns = [bucket for bucket in rows if tile // (64 << bucket) >= 32]
    return [4 * b + 2 + fast for b in (*rows, wide) for fast in (0, 1)] + [
        4 * b + fast for b in (*columns, wide) for fast in (0, 1)
    ]


def of_subspace() -> Iterator[Build]:
    """Projections. Every architecture gets the tiled kinds in the dtypes and tiles that use most, sm_90 everything."""
    for arch in ARCHITECTURES:
        for dtype in FLOAT_DTYPES if arch == 90 else (torch.float64, torch.float32):
            compute = opmath(dtype)
            T, C = (type_of(t) for t in (dtype, compute))
            name, number = str(dtype).removeprefix("torch."), pointer(compute)
            types, redrawn = {"T": T, "C": C}, {"REDRAWN": True}
            memory = {"plan": "*i64", "pointers": "*i64", "step": "*i64"} | {
                k: number for k in ("z", "c", "u", "q", "r", "x", "zx", "acc", "scratch", "z_bar", "out")
            }

            def build(
                kernel: Any,
                label: str,
                warps: int,
                constants: dict[str, Any],
                memory=memory,
                name=name,
                arch=arch,
                **own,
            ) -> Build:
                pointers = {k: own.get(k, memory.get(k)) for k in kernel.arg_names if k in memory or k in own}
                return f"{label} {name}", kernel, pointers, constants, warps, arch

            half = dtype.itemsize == 2
            tiles = (64, 4096, 16384) if arch == 90 and dtype == torch.float32 else (4096,) if half else (64, 4096)
            for tile in tiles:
                options = {**types, **redrawn, "TILE": tile, "LOG": tile.bit_length() - 1, "PACKED": False, "BIG": True}
                options["ALIGNED"] = True
                one_hot = {**options, "SIGNED": True}
                yield build(triton_one_hot.forward, "one_hot_fwd", 8, {**one_hot, "ONE": tile == 4096})
                yield build(triton_one_hot.backward, "one_hot_bwd", 8, one_hot)
                yield build(triton_hadamard.forward, "hadamard_fwd", 8, options)
                yield build(triton_hadamard.backward, "hadamard_bwd", 8, options)
            if half:
                continue
            for signs in (True, False):
                for together in (1, 4) if arch == 90 else (4,):
                    options = {**types, **redrawn, "SIGNS": signs, "KB": together, "ALIGNED": True}
                    warps = triton_entries_launch.warps(together, compute)
                    yield build(triton_entries.forward, "entries_fwd", warps, options)
                for together in (1,) if signs else (1, 2):
                    options = {**types, **redrawn, "SIGNS": signs, "KB": together}
                    warps = triton_entries_launch.warps(together, compute)
                    yield build(triton_entries.backward, "entries_bwd", warps, options, acc="*fp64")
            if arch != 90:
                continue
            yield build(triton_dense.forward, "dense_fwd", 4, types, basis="*bf16")
            yield build(triton_dense.backward, "dense_bwd", 4, types, basis="*bf16")
            scaled = {"SCALED": True}
            yield build(subspace_sums.extend, "extend", 4, {**scaled, "TILE": 4096, "N": 1024})
            yield build(common.fold, "fold", 4, {"TO": TL.float64}, sums="*fp64")
            options = {**scaled, "TILE": 4096, "C": C, "S": 16}
            yield build(subspace_sums.finish, "finish_sums", 4, options, sums="*fp64")
            for at, bits in ((0, 12), (12, 6)):
                yield build(triton_fastfood.transform, "transform", 8, {"AT": at, "BITS": bits})
            own = {"C": C, **redrawn}
            yield build(triton_fastfood.start, "fastfood", 8, own)
            for signs in (True, False):
                yield build(triton_fastfood.gather, "fastfood", 8, {**own, "SIGNS": signs})
                yield build(triton_fastfood.diagonal, "fastfood", 8, {**own, "SIGNS": signs})
            yield build(triton_fastfood.add, "fastfood", 8, {**types, "ALIGNED": True})
            yield build(triton_fastfood.take, "fastfood", 8, {**types, "ALIGNED": True})
            yield build(triton_fastfood.collect, "fastfood", 4, redrawn, u="*fp64")
            yield build(triton_fastfood.end, "fastfood", 4, {**own, **scaled}, u="*fp64")


def of_filters() -> Iterator[Build]:
    """Warps, modulation and networks over filters: 3x3, and the blocks that use most; half weights on sm_90 alone."""
    for arch in ARCHITECTURES:
        for dtype in FLOAT_DTYPES if arch == 90 else (torch.float64, torch.float32):
            compute = opmath(dtype)
            T, C, half = type_of(dtype), type_of(compute), dtype.itemsize == 2
            name, stored, number = str(dtype).removeprefix("torch."), f"*{T.name}", pointer(compute)

            def build(
                kernel: Any,
                label: str,
                constants: dict[str, Any],
                T=T,
                C=C,
                name=name,
                stored=stored,
                number=number,
                arch=arch,
            ) -> Build:
                own, numbers = {"grad", "weight", "source", "out", "dweight"}, {"t": "*fp64", "sums": number}
                found = {k: v for k, v in {"TO": T, "C": C, "K": 9, **constants}.items() if k in kernel.arg_names}
                scalars = set(kernel.fn.__annotations__)
                pointers = {
                    k: stored if k in own else numbers.get(k, number) for k in kernel.arg_names if k not in scalars
                }
                return f"{label} {name}", kernel, pointers, found, constants.get("num_warps", 4), arch

            for adjoint in (False, True) if arch == 90 else (False,):
                for size in (288, 32) if arch == 90 and not half else (288,):
                    block = filter_warp_launch.apply_block(size)
                    yield build(filter_warp.apply, "warp", {"ADJOINT": adjoint, **block})
            for taps in (9, 49):
                yield build(filter_warp.gram, "gram", {"K": taps, **filter_warp_launch.gram_block(32 * taps, taps)})
            for taps in (9, 1) if arch == 90 and not half else (9,):
                flags = {"K": taps, "SCALED": True, "NEED_WEIGHT": True, "NEED_STYLE": True}
                block = modulation_launch.stream_block(512, 512, taps)
                yield build(modulation.stream, "stream", {**flags, **block})
                block = modulation_launch.scales_block(32, 512, taps)
                yield build(modulation.scales, "scales", {"K": taps, **block})
            yield build(modulation.modulated, "modulated", {"SCALED": True, "N": 4, "TILE": modulation_launch.TILE})
            yield build(modulation.finish_weight, "modulated", {"TAPS": 16})
            for activation in ("relu", "tanh") if arch == 90 and not half else ("tanh",):
                flags = {"ACTIVATION": activation, "RESIDUAL": True, "NEED_WEIGHT": True}
                for taps, batch in ((9, 32), (25, 1)):
                    block = filter_mlp_launch.forward_block(batch, taps, compute)
                    yield build(filter_mlp.forward, "mlp_fwd", {**flags, "K": taps, **block})
                    block = filter_mlp_launch.backward_block(taps, compute)
                    yield build(filter_mlp.backward, "mlp_bwd", {**flags, "K": taps, **block})
            if half:
                continue
            yield build(modulation.cubes, "finish", {})
            yield build(modulation.finish_style, "finish", {})
            yield build(filter_mlp.finish_layers, "finish", {})
            yield build(common.fold, "finish", {})
            for kind in ("affine", "rotate") if arch == 90 else ("rotate",):
                block = warp_matrix_launch.block(49)
                flags = {"KIND": kind, "NUMBERS": 6, "CUBIC": True, "BORDER": True, **block}
                yield build(warp_matrix.forward, "matrix_fwd", flags)
                yield build(warp_matrix.backward, "matrix_bwd", flags)


def builds() -> Iterator[Build]:
    yield from of_filters()
    yield from of_subspace()
    yield from of_spectral_norm()


def of_spectral_norm() -> Iterator[Build]:
    for arch in ARCHITECTURES:
        for dtype in FLOAT_DTYPES:
            everything = arch == 90 and dtype in (torch.float32, torch.bfloat16)
            compute = opmath(dtype)
            T, C = (type_of(t) for t in (dtype, compute))
            name, number, warps = str(dtype).removeprefix("torch."), pointer(compute), triton_launch.WARPS
            tile, flat = triton_plan.TILE.get(dtype, triton_plan.DEFAULT_TILE), triton_plan.elementwise_tile(dtype)
            workspace = {"plan": "*i64", "pointers": "*i64", "numbers": number, "sums": "*fp64"}
            kinds = product_kinds(dtype)
            # Most registers: short rows that lie across, the longest ones, and those that no tile holds.
            for kind in kinds if everything else sorted({2, max(k for k in kinds if k < 32), 34, 35, 32}):
                for first in (True, False) if everything and kind in (3, 27, 35) else (True,):
                    constants = dict(T=T, C=C, FIRST=first, KINDS=1 << kind, TILE=tile)
                    label = f"products {name} kind {kind}{'' if first else ' again'}"
                    yield label, triton_kernels.products, workspace, constants, warps, arch
            constants = dict(T=T, C=C, FIRST=True, KINDS=sum(1 << kind for kind in kinds[1::4]), TILE=tile)
            yield f"products {name} mixed", triton_kernels.products, workspace, constants, warps, arch
            state = {**workspace, "state": number}
            for out in FLOAT_DTYPES if everything else (dtype,):
                TO = type_of(out)
                constants = dict(T=T, C=C, TO=TO, WRITE=True, ALIGNED=True, TILE=flat)
                yield f"finish {name} to {out}", triton_kernels.finish, state, constants, warps, arch
            constants = dict(T=T, C=C, TO=T, WRITE=False, ALIGNED=False, TILE=flat)
            yield f"finish {name} state", triton_kernels.finish, state, constants, warps, arch
            table = {"plan": "*i64", "pointers": "*i64", "sums": "*fp64"}
            for dout in (dtype, torch.float16) if dtype == torch.float32 else (dtype,):
                G = type_of(dout)
                constants = dict(T=T, G=G, C=C, ALIGNED=True, TILE=flat)
                yield f"inner {name} from {dout}", triton_backward.inner, table, constants, warps, arch
                for kind in range(14) if everything and dout == dtype else (0, 9, 12):
                    constants = dict(T=T, G=G, C=C, KINDS=1 << kind, TILE=flat)
                    arguments = {**table, "state": number, "dgains": number}
                    label = f"update {name} from {dout} kind {kind}"
                    yield label, triton_backward.update, arguments, constants, warps, arch
        for number, C in (("*fp32", TL.float32), ("*fp64", TL.float64)):
            arguments = {"plan": "*i64", "numbers": number, "sums": "*fp64"}
            yield f"gather {C}", triton_kernels.gather, arguments, {"C": C}, 4, arch
        yield "write", common.write, {"table": "*i64"}, {}, 1, arch


def spills(ptx: str, arch: int) -> int:
    """Bytes of spills. A stack may also be the frame of a division in float64, so it is ptxas that is asked."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    ptxas = BIN / ("ptxas-blackwell" if arch >= 100 and (BIN / "ptxas-blackwell").exists() else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", source.with_suffix(".cubin")]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    # a function that is called, such as the slow path of a sine, has lines of its own
    return sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text)))


def number(kernel: Any, name: str) -> str:
    """The type of an argument that is a number, as the kernel declares it."""
    return "i32" if "int32" in str(kernel.fn.__annotations__.get(name, "")) else "i64"


def compiled(build: Build) -> tuple[int, int, int]:
    """Registers, bytes of spills and of shared memory."""
    _, kernel, pointers, constants, warps, arch = build
    kinds = {
        name: pointers.get(name, "constexpr" if name in constants else number(kernel, name))
        for name in kernel.arg_names
    }
    places = {name: (i,) for i, name in enumerate(kinds)}
    source = ASTSource(
        kernel,
        signature=kinds,
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    options: dict[str, Any] = {"num_warps": warps}
    if "subspace" in kernel.fn.__module__:
        options["enable_fp_fusion"] = False
    forward = kernel in (filter_mlp.forward, filter_warp.apply)
    if forward or kernel.fn.__module__.endswith(("one_hot", "hadamard", "entries")):
        options |= common_launch.REGISTERS
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        sys.exit(f"cuobjdump says nothing of registers: {text}")
    spilled = spills(result.asm["ptx"], arch) if int(found[2]) else 0
    return int(found[1]), spilled, result.metadata.shared


def main() -> None:
    begun, worst, failures = time.monotonic(), defaultdict(lambda: (0, 0, 0, 0)), []
    todo = list(builds())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for build, (registers, spilled, shared) in zip(todo, pool.map(compiled, todo), strict=True):
            key = f"sm_{build[5]}", build[0].split()[0]
            before = worst[key]
            worst[key] = (before[0] + 1, *map(max, before[1:], (registers, spilled, shared)))
            if spilled or shared > SHARED or registers > REGISTERS:
                failures.append(
                    f"{build[0]}, sm_{build[5]}: {registers} registers, {spilled} bytes of spills, {shared} shared"
                )
    print(f"{'':8}{'kernel':10}{'variants':>9}{'registers':>11}{'spills':>7}{'shared':>8}")
    for (arch, kernel), numbers in worst.items():
        print(f"{arch:8}{kernel:10}{numbers[0]:9}{numbers[1]:11}{numbers[2]:7}{numbers[3]:8}")
    print(f"{len(todo)} kernels compiled in {time.monotonic() - begun:.0f} s")
    if failures:
        sys.exit("\n".join(["spills, or over budget:", *failures]))


if __name__ == "__main__":
    main()
