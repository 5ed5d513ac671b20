"""Weight decay of one update: its value, and its gradient added in place to those that the passes left.

With autograd the gradient of a norm is a new tensor as large as the weights, written only to be added and freed: on the
CPU that costs several times the arithmetic. Equal to the term that `penalties` gives, gradient included
(`tests/test_loss_terms.py`). Shape suffixes: B examples, H hyperparameters.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stn_fx.bilevel.penalties import penalized_groups
from stn_fx.rules.structure import gradient_of, square_norm

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


class Decay:
    """``mean_i decay_i |w + DeltaW_i|^2 / 2`` over all groups of weights.

    Args:
        stn: the wrapped model.
        values: constrained values (B,) by name.
        raw_BH: the raw values of a perturbed pass, whose gradient is that of the response; None in the base pass, whose
            gradient is that of the weights.

    Attributes:
        value: its value, detached.
    """

    def __init__(self, stn: "SelfTuningModule", values: Mapping[str, Tensor], raw_BH: Tensor | None = None) -> None:
        self.value = stn.hparams.raw.new_zeros(())
        self._additions: list[tuple[list[nn.Parameter], Callable[[float], None]]] = []
        with torch.autocast(stn.hparams.raw.device.type, enabled=False):
            for name, group in penalized_groups(stn, "weight_decay").items():
                coefficient_B, weights = 0.5 * values[name].detach() / len(values[name]), stn.penalized(group)
                for weight in weights.values():
                    self.value = self.value + coefficient_B.sum() * square_norm(weight.detach())
                    if raw_BH is None:
                        self._additions.append(([weight], _along(weight, 2 * coefficient_B.sum())))
                if raw_BH is not None:
                    delta_BH = raw_BH - stn.hparams.raw.detach()
                    for each, response in stn.responses_of_parameters(weights):
                        change, addition = response.penalize(weights[each].detach(), delta_BH, coefficient_B)
                        self.value = self.value + change
                        self._additions.append((list(response.parameters()), addition))

    def add_gradient(self, factor: float, parameters: Iterable[nn.Parameter]) -> None:
        """Add ``factor`` times the gradient as ``backward(inputs=parameters)`` would; to be called once."""
        wanted = {id(parameter) for parameter in parameters}
        for owners, addition in self._additions:
            others = [(p, p.grad) for p in owners if id(p) not in wanted]
            if len(others) == len(owners):
                continue
            for parameter, _ in others:
                parameter.grad = None
            addition(factor)
            for parameter, gradient in others:
                parameter.grad = gradient


def _along(weight: nn.Parameter, coefficient: Tensor) -> Callable[[float], None]:
    @torch.no_grad()
    def add(factor: float) -> None:
        gradient_of(weight).addcmul_(weight, coefficient * factor)

    return add
