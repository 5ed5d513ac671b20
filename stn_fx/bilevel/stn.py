"""`STN`: self-tuning networks as MacKay et al. 2019 (arXiv 1903.03088) train them, before Delta-STN.

One loss at perturbed hyperparameters trains base and response together, without linearization, and the response is not
centred: w(lambda) = v0 + DeltaW(lambda - c), with a constant c (here the initial values).

The user's model always holds the weights at the current hyperparameters, w = v0 + DeltaW(lambda - c), as for every
other algorithm; v0 is never stored. The gradient is that of the uncentred form nonetheless: w enters the loss as
w + d - stop(d) with d = DeltaW(lambda - c), and after every step w follows the change of d.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stn_fx.bilevel.algorithm import InnerRecord, OuterRecord, is_captured, training_mode
from stn_fx.bilevel.apply import Updater
from stn_fx.bilevel.batch import Batch
from stn_fx.bilevel.mixing import mix
from stn_fx.bilevel.penalties import penalized_groups, penalties
from stn_fx.bilevel.steps import DeltaSTN
from stn_fx.bilevel.updates import buffers_of_an_update, named_values
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


class STN(DeltaSTN):
    """STN without centring; arguments as for `DeltaSTN`, without `response_step`: base and response learn together.

    Perturbed example by example, also beside batch norms, which makes the response wrong there (see `PerGroup`); a
    warning says so.

    Raises:
        InputError: a response lives on an effective tensor instead of a parameter, so that it cannot be added to one;
            or a `response_step` is given.
    """

    linearizes = False

    def __init__(self, stn: "SelfTuningModule", *arguments: Any, **options: Any) -> None:
        if options.get("response_step") is not None:
            raise InputError("STN learns base and response in one step, so it has no response_step. Leave it out.")
        super().__init__(stn, *arguments, **options)

    def inner_step(self, content: Any) -> InnerRecord:
        """One joint update of base and response parameters with fresh perturbations."""
        batch = self.prepare(content)
        raw_BH = self.sampling.inner(self.stn.hparams, batch.rows, self.perturbations).detach()
        updater = self.updaters["base"]
        settle = buffers_of_an_update(self.stn, updater)
        with training_mode(self.stn), self._following():
            with self.precision():
                loss = self._loss(batch, raw_BH)
            outcome = updater.apply(loss, "training loss of the perturbed network", batch.rows.share)
        return InnerRecord.of(settle(outcome))

    def description(self) -> dict[str, Any]:
        description = super().description()
        del description["response"]  # it has none of its own
        return description

    def outer_step(self, content: Any) -> OuterRecord:
        """One update of raw hyperparameters and scales; the weights follow their response to it."""
        if not is_captured(self.stn):  # the weights that follow are known afterwards
            self.prepare(content)
        with self._following():
            return super().outer_step(content)

    def _loss(self, batch: Batch, raw_BH: Tensor) -> Tensor:
        stn = self.stn
        moved = {name: change - change.detach() for name, change in self._from_centre().items()}
        parameters = self._parameters()
        base = {name: p + moved[name] if name in moved else p for name, p in parameters.items()}
        hyperparameters = named_values(stn, raw_BH)
        mixed = mix(stn, batch, hyperparameters)
        with stn.watching() as activations:
            output = mixed.batch.feed(stn.respond_in_training, raw=raw_BH, base=base)
        batch = mixed.with_targets(output)
        loss = self.objective.training_loss(output, batch, hyperparameters)
        loss = sum(penalties(stn, output, hyperparameters, raw_BH, batch, activations), loss)
        return loss + self._through_weights(base, hyperparameters, raw_BH)

    def _through_weights(self, base: dict[str, Tensor], values: dict[str, Tensor], raw_BH: Tensor) -> Tensor:
        """Zero, with the gradient that the norms among `penalties` have in w; they hold it detached."""
        stn, zero = self.stn, raw_BH.new_zeros(())
        delta_BH = raw_BH - stn.hparams.raw.detach()
        with torch.autocast(raw_BH.device.type, enabled=False):
            for hyperparameter, names in penalized_groups(stn, "weight_decay").items():
                # mean_i decay_i |w + DeltaW_i|^2 / 2
                decay_B = values[hyperparameter]
                changes = stn.weight_response((decay_B[:, None] * delta_BH).mean(0))
                for name in stn.penalized(names):
                    zero = zero + _live(0.5 * decay_B.mean() * base[name].square().sum())
                    if name in changes:
                        zero = zero + _live((base[name] * changes[name].detach()).sum())
            for hyperparameter, names in penalized_groups(stn, "l1").items():
                # To first order, as `absolute_norm`.
                for name in stn.penalized(names):
                    zero = zero + _live(values[hyperparameter].mean() * base[name].abs().sum())
        return zero

    def _from_centre(self) -> dict[str, Tensor]:
        """DeltaW(lambda - c) by parameter, differentiable in the response parameters."""
        space = self.stn.hparams
        centre_H = space.raw.new_tensor([each.raw_initial() for each in space.resolved])
        return self.stn.weight_response(space.raw.detach() - centre_H)

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Whatever changes DeltaW(lambda - c) changes the weights in the user's model by as much."""
        parameters = self._parameters()
        with torch.no_grad():
            before = self._from_centre()
            missing = sorted(set(before) - set(parameters))
            if missing:
                raise InputError(
                    f"STN needs every response on a parameter, and these are on effective tensors: "
                    f"{', '.join(missing[:4])}. Use DeltaSTN, which needs no sum of both."
                )
        yield
        with torch.no_grad():
            for name, change in self._from_centre().items():
                parameters[name].add_(change - before[name])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.stn.model.named_parameters())

    def _build_optimizers(self) -> None:
        super()._build_optimizers()
        del self.updaters["response"]
        joint = [self.optimizers["base"], self.optimizers["response"]]
        options = (self.updates.accumulate, self.updates.clip_norm, self.updates.skip_limit, self.replicas)
        self.updaters["base"] = Updater(joint, "base and response", *options)


def _live(value: Tensor) -> Tensor:
    """Zero with the gradient of `value`."""
    return value - value.detach()
