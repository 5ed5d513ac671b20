"""`TunedLightningModule`: training and tuning of a wrapped model by a Lightning `Trainer`. Needs the extra `lightning`.

Imported by whoever uses it and by nothing else here: `from stn_fx.bilevel.lightning import TunedLightningModule`.
Lightning brings the loop, loggers, checkpoints and progress; the updates are those of `DeltaSTN`, by its manual
optimization.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch.optim import Optimizer

from stn_fx.bilevel.generators import Generators
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.reader import BatchReader
from stn_fx.bilevel.steps import DeltaSTN, DeltaSTNOptions
from stn_fx.bilevel.trainer import TRAIN_STEPS
from stn_fx.bilevel.updates import validation_loss
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


class TunedLightningModule(LightningModule):
    """Inner steps on the training batches, outer steps between them; logs `train_loss`, `valid_loss` and the values.

    Args:
        stn: the wrapped model, captured already (`example_inputs` given), so that Lightning can load its parameters.
        valid: loader of validation batches, for the outer steps; the one for Lightning's own validation may be the
            same.
        loss: as for `DeltaSTN`.
        warmup_epochs: epochs before the first outer step.
        train_steps: T_train, inner steps between two rounds of outer steps.
        valid_steps: T_valid, outer steps in a round.
        options: of `DeltaSTN`: optimizers, entropy weight, updates.

    Raises:
        InputError: the validation loader is empty; (at the start of `fit`) Lightning runs several processes, or scales
            losses in half precision.
    """

    def __init__(
        self,
        stn: "SelfTuningModule",
        valid: Iterable[Any],
        loss: Loss | Objective = F.cross_entropy,
        *,
        warmup_epochs: int = 1,
        train_steps: int = TRAIN_STEPS,
        valid_steps: int = 1,
        options: DeltaSTNOptions | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.stn = stn
        self.steps = DeltaSTN(stn, loss, **(options or {}))
        self.warmup_epochs = warmup_epochs
        self.train_steps = train_steps
        self.valid_steps = valid_steps
        self._generators = Generators(stn, {"valid": valid})
        self._reader = BatchReader(valid, "validation", self._generators)
        self._validation = self._reader.endless()
        self._inner = 0

    def configure_optimizers(self) -> list[Optimizer]:
        """Those of the algorithm, so that Lightning saves them and shows their rates."""
        if self.trainer.world_size > 1:
            raise InputError(
                "TunedLightningModule trains in one process, and Lightning was asked for several: its wrapper around "
                "the forward sees none of the three updates. Use BilevelTrainer with torchrun, or devices=1."
            )
        if self.trainer.scaler is not None:
            raise InputError(
                "Half precision with scaled losses is not supported. Use precision='32-true' and "
                "options={'updates': UpdateOptions(autocast=torch.bfloat16)}."
            )
        return list(self.steps.optimizers.values())

    def on_train_start(self) -> None:
        # Steps of the weights go through Lightning's wrapper, which counts them: checkpoints go by that number.
        base = self.steps.optimizers["base"]
        wrappers: Any = self.optimizers()
        self.steps.updaters["base"].optimizers = [each for each in wrappers if each.optimizer is base]

    def training_step(self, batch: Any, batch_index: int) -> None:
        record = self.steps.inner_step(batch)
        self._inner += 1
        self.log("train_loss", record.loss, prog_bar=True)
        due = self._inner % (self.train_steps * self.steps.updates.accumulate) == 0
        if due and self.current_epoch >= self.warmup_epochs:
            for _ in range(self.valid_steps):
                self.steps.outer_step(next(self._validation))
        self.log_dict(self.stn.hparams.values())

    def validation_step(self, batch: Any, batch_index: int) -> None:
        prepared = self.steps.prepare(batch)
        with torch.no_grad():
            loss = validation_loss(self.stn, self.steps.objective, prepared)
        rows = prepared.rows
        self.log("valid_loss", loss, prog_bar=True, batch_size=rows.stop - rows.start)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stn_fx"] = {
            "inner": self._inner,
            "algorithm": self.steps.state_dict(),
            "valid": self._reader.state(),
            "loaders": self._generators.state()["loaders"],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["stn_fx"]
        self._inner = state["inner"]
        before = self._generators.state()
        self._reader.restore(state["valid"])
        self._generators.restore(before | {"loaders": state["loaders"]})
        self.steps.load_state_dict(state["algorithm"])
