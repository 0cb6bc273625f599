"""Folded layers on two processes give the gradients, outputs and power iterations of one: DDP and FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch.distributed
from computed_oracle import unsettle
from torch import nn

import weightxform as wx

sys.path.insert(0, str(Path(__file__).parent / "distributed"))
import workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

plain_model = workers.model


def model(constrain: bool, cache: bool = True) -> nn.Sequential:
    """The model of the other tests, folded."""
    wx.nn.SMALLEST = 0
    net = plain_model(constrain, cache)
    assert all(wx.nn.fold_layer(net[i]) for i in workers.LAYERS)
    return unsettle(net)


def ddp(rank: int, folder: str) -> None:
    workers.model = model
    with workers.group(rank, folder):
        for constrain in (False, True):
            workers.ddp_steps(rank, constrain, {})
            workers.ddp_steps(rank, constrain, {"static_graph": True})
            workers.ddp_steps(rank, constrain, {"gradient_as_bucket_view": True}, micro=3, two_forwards=True)


def fsdp(rank: int, folder: str) -> None:
    workers.model = model
    with workers.group(rank, folder):
        for units, reshard, constrain, cache in [
            ("layers", True, False, True),
            ("layers", False, True, True),
            ("root", True, True, True),
            ("some", True, False, False),
        ]:
            workers.fsdp_steps(rank, units, reshard, constrain, cache)


@pytest.mark.parametrize("worker", [ddp, fsdp])
def test_two_processes(worker, tmp_path):
    workers.spawn(worker, str(tmp_path))
