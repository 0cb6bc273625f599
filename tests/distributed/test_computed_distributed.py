"""Two processes give the gradients, outputs and power iterations of one: DDP, FSDP2, Hogwild."""

from __future__ import annotations

import pytest
import torch.distributed
import workers

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.mark.parametrize("worker", [workers.ddp, workers.fsdp_single_units, workers.fsdp_groups, workers.hogwild])
def test_two_processes(worker, tmp_path):
    workers.spawn(worker, str(tmp_path))
