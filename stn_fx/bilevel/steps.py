"""The algorithms: `DeltaSTN` tunes; `FixedHyperparameters` trains the same model without tuning, the fair baseline."""

import warnings
from typing import TYPE_CHECKING, Any, TypedDict

import torch.nn.functional as F

from stn_fx.bilevel.algorithm import Algorithm, InnerRecord, OuterRecord, training_mode
from stn_fx.bilevel.apply import UpdateOptions
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.optimizers import OptimizerChoice, Role
from stn_fx.bilevel.response_step import ResponseStep, usual_step
from stn_fx.bilevel.sampling import PerExample, PerGroup, Sampling
from stn_fx.bilevel.updates import base_update, hyper_update
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

ENTROPY_WEIGHT = 1e-3


class DeltaSTNOptions(TypedDict, total=False):
    """Keyword arguments of `DeltaSTN`, as `BilevelTrainer` hands them on."""

    base_optimizer: OptimizerChoice
    response_optimizer: OptimizerChoice
    hyper_optimizer: OptimizerChoice
    scale_optimizer: OptimizerChoice
    entropy_weight: float
    updates: UpdateOptions | None
    sampling: Sampling | None
    response_step: ResponseStep | None
    tune_scales: bool


class DeltaSTN(Algorithm):
    """Delta-STN (Bae & Grosse 2020, arXiv 2010.13514): follows the validation loss through the learned best response.

    In an own loop::

        steps = stn_fx.DeltaSTN(stn, loss=F.cross_entropy)
        for i, batch in enumerate(train_loader):
            steps.inner_step(batch)
            if i % 2 == 1:
                steps.outer_step(next(valid_batches))

    Learning rates cannot be tuned this way: the hypergradient flows through the weights that training converges to, and
    they do not depend on the learning rate.

    Args:
        stn: the wrapped model.
        loss: `loss(output, target)` returning per-example losses or their mean, or an `Objective`.
        base_optimizer: torch optimizer over `stn.base_parameters()`, a factory that is given the list of them, or None
            for the default of `stn_fx.bilevel.optimizers`. The same for the others.
        response_optimizer: over `stn.response_parameters()`.
        hyper_optimizer: over `[stn.hparams.raw]`.
        scale_optimizer: over `[stn.hparams.raw_scale]`.
        entropy_weight: tau in `L_valid - tau * entropy(scale)`, per nat.
        updates: gradient accumulation and clipping, autocast, and how many updates in a row may be skipped because they
            are not finite.
        sampling: where perturbed hyperparameters come from; where None, `PerGroup()` for a model whose batch norms take
            statistics of the batch, else `PerExample()`. One that does not suit such a model is used, with a warning.
        response_step: how the response is learned; `EveryKth(OnFraction(Linearized(), 0.5, least=32), 4)` where None.
        tune_scales: whether outer steps move the scales (of a sampling that has them); else they stay as they began.

    Raises:
        InputError: an optimizer over other parameters, or with a weight decay beside the hyperparameter weight_decay.
    """

    tunes = True
    linearizes = True
    """Whether the response is learned in linearized passes."""

    def __init__(
        self,
        stn: "SelfTuningModule",
        loss: Loss | Objective = F.cross_entropy,
        *,
        base_optimizer: OptimizerChoice = None,
        response_optimizer: OptimizerChoice = None,
        hyper_optimizer: OptimizerChoice = None,
        scale_optimizer: OptimizerChoice = None,
        entropy_weight: float = ENTROPY_WEIGHT,
        updates: UpdateOptions | None = None,
        sampling: Sampling | None = None,
        response_step: ResponseStep | None = None,
        tune_scales: bool = True,
    ) -> None:
        choices: dict[Role, OptimizerChoice] = {
            "base": base_optimizer,
            "response": response_optimizer,
            "hyper": hyper_optimizer,
        }
        self.sampling = sampling or PerExample()
        self._chosen_by_model = sampling is None
        if tune_scales and self.sampling.uses_scales:
            choices["scale"] = scale_optimizer
        elif scale_optimizer is not None:
            raise InputError(
                "scale_optimizer: given beside tune_scales=False, or a sampling without scales: it has nothing to do."
            )
        super().__init__(stn, loss, choices, updates)
        self.entropy_weight = entropy_weight
        self.response_step = response_step or usual_step()

    def _build_optimizers(self) -> None:
        super()._build_optimizers()
        if not self.stn.compiled.takes_batch_statistics:
            return
        if self._chosen_by_model and self.linearizes:
            self.sampling = PerGroup()
        elif not self.sampling.suits_batch_norms:
            remedy = "Leave sampling out" if self.linearizes else "Use DeltaSTN, or pass sampling=PerBatch()"
            warnings.warn(
                f"The model has batch norms with statistics of the batch, and {type(self).__qualname__} with "
                f"{self.sampling} perturbs every example by itself. The response will learn to scale weights before a "
                f"norm, which no hyperparameter that all examples share can do. {remedy}.",
                stacklevel=4,
            )

    def begin(self) -> None:
        super().begin()
        self.response_step.begin()

    def inner_step(self, content: Any) -> InnerRecord:
        """One update of the base parameters, then one of the response parameters with fresh perturbations."""
        batch = self.prepare(content)
        with training_mode(self.stn):
            base = base_update(self.stn, self.objective, self.updaters["base"], batch, self.precision())
            response = self.response_step(self, batch)
        return InnerRecord.of(base, response)

    def description(self) -> dict[str, Any]:
        options = {"entropy weight": self.entropy_weight, "tune scales": "scale" in self._choices}
        return super().description() | options | {"sampling": str(self.sampling), "response": str(self.response_step)}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"response_step": self.response_step.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.response_step.load_state_dict(state["response_step"])

    def outer_step(self, content: Any) -> OuterRecord:
        """One update of raw hyperparameters and scales; base, response and buffers are untouched."""
        batch = self.prepare(content)
        raw_BH = self.sampling.outer(self.stn.hparams, batch.rows, self.perturbations)
        updater, precision = self.updaters["hyper"], self.precision()
        with self.stn.in_groups(self.sampling.group, batch.rows.start):
            outcome = hyper_update(self.stn, self.objective, updater, batch, raw_BH, self.entropy_weight, precision)
        return OuterRecord.of(outcome)


class FixedHyperparameters(Algorithm):
    """Ordinary training of the wrapped model: the base pass alone, at hyperparameters that stay as they are.

    Args:
        stn: the wrapped model.
        loss: as for `DeltaSTN`.
        base_optimizer: as for `DeltaSTN`.
        updates: as for `DeltaSTN`.
    """

    tunes = False

    def __init__(
        self,
        stn: "SelfTuningModule",
        loss: Loss | Objective = F.cross_entropy,
        *,
        base_optimizer: OptimizerChoice = None,
        updates: UpdateOptions | None = None,
    ) -> None:
        super().__init__(stn, loss, {"base": base_optimizer}, updates)

    def inner_step(self, content: Any) -> InnerRecord:
        """One update of the base parameters."""
        batch = self.prepare(content)
        with training_mode(self.stn):
            return InnerRecord.of(base_update(self.stn, self.objective, self.updaters["base"], batch, self.precision()))

    def outer_step(self, content: Any) -> OuterRecord:
        """Refused: fixed hyperparameters have no outer step."""
        raise InputError("FixedHyperparameters has no outer step. Use DeltaSTN to tune.")
