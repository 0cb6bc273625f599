"""Load the compiled kernels."""

from __future__ import annotations

import importlib.util


def load_kernels() -> None:
    """Import ``_C`` where it was built. One that is there and does not import is an error, not a fallback."""
    if importlib.util.find_spec("weightxform._C") is not None:
        importlib.import_module("weightxform._C")
