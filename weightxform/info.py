"""What is installed here, what was built, and which backend serves each op: ``python -m weightxform info``."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass

import torch

from . import _load, backends
from ._version import __version__
from .registry import OPS


@dataclass(frozen=True)
class Info:
    """What :func:`info` found. ``str`` of it is a report.

    Attributes:
        versions: of weightxform, Python, torch and triton.
        devices: what torch sees, by device type.
        kernels: what became of each compiled library.
        forced: the backend that is forced, if one is.
        serving: for each op and device type, the backend that serves it and why.
    """

    versions: dict[str, str]
    devices: dict[str, str]
    kernels: dict[str, str]
    forced: str | None
    serving: dict[str, dict[str, tuple[str, str]]]

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {version}" for name, version in self.versions.items())]
        for title, rows in (("devices", self.devices), ("kernels", self.kernels)):
            lines += ["", title, *columns([[f"  {name}", text] for name, text in rows.items()])]
        lines += ["", "backend of each op" + (f" (forced: {self.forced})" if self.forced else "")]
        table = []
        for op, devices in self.serving.items():
            for i, (device, (backend, why)) in enumerate(devices.items()):
                table.append([f"  {'' if i else op}", device, backend, why])
        return "\n".join([*lines, *columns(table)])


def columns(rows: list[list[str]]) -> list[str]:
    """The rows as lines of aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # nightly builds of torch bring it under another name
        return "of unknown version"


def _devices() -> dict[str, str]:
    capability = torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        text = ", ".join(f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in gpus)
        driver = _load.driver_version()
        found["cuda"] = text if driver is None else f"{text}, the driver knows CUDA {_load.release(driver)}"
    elif torch.version.cuda is not None or _load.kernels is not None:
        found["cuda"] = "no GPU"
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type not in found:
        found[accelerator.type] = f"{torch.accelerator.device_count()} x {accelerator.type}"
    return found


def info() -> Info:
    """What is installed here, what was built, and which backend each op uses on each device, and why."""
    versions = {
        "weightxform": __version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton(),
    }
    devices = _devices()
    serving = {op: {device: backends.serving(op, device) for device in devices} for op in OPS}
    return Info(versions, devices, dict(_load.status), backends.forced, serving)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a report")


def run(args: Namespace) -> int:
    found = info()
    print(json.dumps(asdict(found), indent=2) if args.json else found)
    return 0
