"""What the constraint costs: a whole training step with it, and the same step without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .case import LAYERS, Problem, Room, Variant
from .timing import Call, interleave

PLAIN = "plain"


def _step(forward: Callable[[], Tensor], parameters: list[Tensor], dout: Tensor) -> Callable[[], None]:
    """Forward, backward, SGD. The rate is small enough for random gradients to leave the weights finite."""
    optimizer = torch.optim.SGD(parameters, lr=1e-9)

    def body() -> None:
        optimizer.zero_grad()
        forward().backward(dout)
        optimizer.step()

    return body


def step_costs(room: Room, problem: Problem, compiled: Variant | None, seconds: float) -> dict[str, Any]:
    """Times of the steps, and ``cost``: the part of the unconstrained step that the constraint adds.

    ``compiled`` computes the weights in a compiled region; the model around it is run eagerly, as in the others.
    """
    assert problem.case.inputs is not None and room.constrain is not None
    x = problem.randn(*problem.case.inputs)
    with torch.no_grad():
        dout = torch.randn_like(problem.model(x))

    def of(model: nn.Module) -> Callable[[], None]:
        return _step(lambda: model(x), list(model.parameters()), dout)

    steps = {PLAIN: of(copy.deepcopy(problem.model))}
    for how in room.constraints:
        steps[how] = of(room.constrain(copy.deepcopy(problem.model), how))
    if compiled is not None:
        model, variant = copy.deepcopy(problem.model), compiled
        names = [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, LAYERS)]
        others = [p for name, p in model.named_parameters() if name not in set(names)]

        def forward() -> Tensor:
            return functional_call(model, dict(zip(names, variant.forward(), strict=True)), (x,))

        steps["compiled"] = _step(forward, [*variant.raws, *others], dout)

    times = interleave([Call(name, body) for name, body in steps.items()], problem.device, seconds)
    return {
        "inputs": list(problem.case.inputs),
        "times": {name: t.as_json() for name, t in times.items()},
        "cost": {name: t.ratio(times[PLAIN]) - 1 for name, t in times.items() if name != PLAIN},
    }
