"""``python -m weightxform demo``: real data, weightxform beside plain torch, and an answer that can be checked."""

from .cli import add_arguments, run

__all__ = ["add_arguments", "run"]
