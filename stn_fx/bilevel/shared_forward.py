"""`SharedForward`: Delta-STN with one forward for the updates of weights and response, cheaper by that forward.

`DeltaSTN` trains the weights at the current hyperparameters, and the response in a pass of its own at perturbed ones.
Here the primal of the linearized pass is also what the weights learn from, so that they are trained at perturbed
hyperparameters, as in the first STN paper (MacKay et al. 2019), but never through the response.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stn_fx.arguments import require_count
from stn_fx.bilevel.algorithm import InnerRecord, training_mode
from stn_fx.bilevel.apply import Outcome
from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.decay import Decay
from stn_fx.bilevel.generators import default_generators
from stn_fx.bilevel.mixing import MixedBatch, mix
from stn_fx.bilevel.penalties import other_penalties
from stn_fx.bilevel.response_step import EVERY
from stn_fx.bilevel.sampling import GlobalSampling
from stn_fx.bilevel.steps import DeltaSTN
from stn_fx.bilevel.updates import (
    base_update,
    buffers_of_an_update,
    linearized_response_loss,
    named_values,
    sum_of_primal_and_tangent,
)
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import LinearizedPass, SelfTuningModule


class SharedForward(DeltaSTN):
    """Delta-STN with one forward for base and response; arguments as for `DeltaSTN`, without `response_step`.

    Args:
        stn: the wrapped model.
        every: in every so many inner steps the response learns, and weights are trained at perturbed hyperparameters;
            in the others at the current ones.
        antithetic: whether the response also learns from the opposite perturbation with the same masks, which takes a
            linearized pass of its own.

    Raises:
        InputError: a `response_step` is given, or an option is out of range.
        StnError: the model has recurrent layers, or a part that cannot be captured; where it is captured later, the
            first step raises it.
    """

    def __init__(
        self,
        stn: "SelfTuningModule",
        *arguments: Any,
        every: int = EVERY,
        antithetic: bool = True,
        **options: Any,
    ) -> None:
        if options.get("response_step") is not None:
            raise InputError("SharedForward has a response step of its own. Leave response_step out.")
        if isinstance(options.get("sampling"), GlobalSampling):
            raise InputError(
                "SharedForward with GlobalSampling would train the weights around the initial hyperparameters, "
                "whatever the current ones are. Use PerExample, or DeltaSTN."
            )
        require_count("every", every)
        super().__init__(stn, *arguments, **options)
        self.every = every
        self.antithetic = antithetic
        self._passed = 0

    def begin(self) -> None:
        super().begin()
        self._passed = 0

    def inner_step(self, content: Any) -> InnerRecord:
        """One update of the base parameters, and in every so many steps one of the response by the same forward."""
        batch = self.prepare(content)
        due = self._passed // self.updates.accumulate % self.every == 0
        with training_mode(self.stn):
            if due:
                with self.stn.in_groups(self.sampling.group, batch.rows.start):
                    outcomes = self._joint_update(batch)
            else:
                updater = self.updaters["base"]
                outcomes = (base_update(self.stn, self.objective, updater, batch, self.precision()),)
        self._passed += 1
        return InnerRecord.of(*outcomes)

    def description(self) -> dict[str, Any]:
        own = f"one forward with the weights (every={self.every}, antithetic={self.antithetic})"
        return super().description() | {"response": own}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"passed": self._passed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._passed = state["passed"]

    def _build_optimizers(self) -> None:
        self.stn.compiled.require_trainable_primal()
        super()._build_optimizers()

    def _joint_update(self, batch: Batch) -> tuple[Outcome, ...]:
        stn, objective = self.stn, self.objective
        raw_BH = self.sampling.inner(stn.hparams, batch.rows, self.perturbations).detach()
        raws = [raw_BH, self.sampling.opposite(stn.hparams, raw_BH)] if self.antithetic else [raw_BH]
        values = named_values(stn, raw_BH)
        settle = buffers_of_an_update(stn, self.updaters["base"])

        @cache
        def forward() -> "tuple[MixedBatch, LinearizedPass]":
            with self.precision():
                mixed = mix(stn, batch, values)
                return mixed, mixed.batch.feed(stn.linearize_and_train, raw=raw_BH)

        def loss_of(output: Any, seen: list[Tensor], perturbed: Tensor | None) -> Tensor:
            with self.precision():
                targeted = forward()[0].with_targets(output)
                loss = objective.training_loss(output, targeted, values)
                return sum(other_penalties(stn, output, values, perturbed, targeted, seen), loss)

        def response_loss() -> Tensor:
            primal, tangent, activations, changes = forward()[1]
            moved = [a.detach() + change for a, change in zip(activations, changes, strict=True)]
            return loss_of(sum_of_primal_and_tangent(primal, tangent), moved, raw_BH)

        def opposite_loss() -> Tensor:
            with self._drawn_again():
                return linearized_response_loss(stn, objective, batch, raws[1], self.precision())

        # The opposite first, which sees the buffers as they are; the weights last, as the response's graph holds them.
        losses = [opposite_loss, response_loss] if self.antithetic else [response_loss]
        both_BH = torch.cat(raws)
        decay, share = Decay(stn, named_values(stn, both_BH), both_BH), batch.rows.share
        response = self.updaters["response"].apply(losses, "training loss of the response", share, decay)
        trained = forward()[1]
        loss = loss_of(trained.primal, trained.activations, None)
        what = "training loss of the perturbed network"
        return settle(self.updaters["base"].apply(loss, what, share, Decay(stn, values))), response

    @contextmanager
    def _drawn_again(self) -> Iterator[None]:
        """What is drawn inside is drawn again afterwards; a model may draw from the global generators too."""
        generators = [*self._masks(), *default_generators(self.stn.hparams.raw.device)]
        states = [generator.get_state() for generator in generators]
        yield
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
