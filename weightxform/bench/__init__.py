"""``python -m weightxform bench``: correctness first, then times beside torch, torch.compile and a copy."""

from .cli import add_arguments, run

__all__ = ["add_arguments", "run"]
