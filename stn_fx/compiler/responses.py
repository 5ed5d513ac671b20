"""The response parameters that a plan asks for."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from stn_fx.compiler.plan import ParameterPlan, Plan
from stn_fx.rules.structure import Exact, LowRankResponse, Response, RowWiseResponse, RowWiseSumResponse


def build_responses(plan: Plan, model: nn.Module, generator: torch.Generator) -> dict[str, Response]:
    """New responses by the qualified name of their parameter or effective weight, on its device and in its dtype.

    Args:
        plan: of the model.
        model: the user's, whose parameters tell device and dtype.
        generator: on the CPU.
    """
    reference = next(p for p in model.parameters() if p.is_floating_point())
    parameters = dict(model.named_parameters())
    responses = {}
    for each in plan.parameters:
        weight = parameters.get(each.name)
        like = reference if weight is None else weight
        with _made_like(like):
            response = _response(each, len(plan.hyperparameters))
        if response is None:
            continue
        response.to(device=like.device, dtype=like.dtype)
        response.initialise(generator)
        if each.padding_row is not None:
            response.silence(each.padding_row)
        responses[each.name] = response
    return responses


@contextlib.contextmanager
def _made_like(tensor: Tensor) -> Iterator[None]:
    """New tensors have this one's device and dtype: responses are as large as the model, and a cast would copy them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(tensor.dtype if tensor.is_floating_point() else before)
    try:
        with tensor.device:
            yield
    finally:
        torch.set_default_dtype(before)


def planned_shapes(plan: Plan) -> dict[str, dict[str, torch.Size]]:
    """Shapes of the parts of every response that the plan asks for, without making them."""
    with torch.device("meta"):
        made = {each.name: _response(each, len(plan.hyperparameters)) for each in plan.parameters}
    return part_shapes({name: response for name, response in made.items() if response is not None})


def part_shapes(responses: Mapping[str, Response]) -> dict[str, dict[str, torch.Size]]:
    """``{name: {part: shape}}``, as ``{"fc.weight": {"U": (10, 84), "V": (10, 3)}}``."""
    return {
        name: {part: parameter.shape for part, parameter in response.named_parameters()}
        for name, response in responses.items()
    }


def _response(plan: ParameterPlan, hyperparameters: int) -> Response | None:
    if plan.structure == "row-wise":
        if plan.terms > 1:
            return RowWiseSumResponse(plan.shape, plan.row_axis, hyperparameters, plan.terms)
        return RowWiseResponse(plan.shape, plan.row_axis, hyperparameters)
    if plan.structure == "low-rank":
        return LowRankResponse(plan.shape, plan.row_axis, hyperparameters, plan.rank)
    return Exact(plan.shape, hyperparameters) if plan.structure == "exact" else None
