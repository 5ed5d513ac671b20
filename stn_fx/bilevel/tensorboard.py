"""`TensorBoard`: losses, hyperparameters and scales as scalars of a TensorBoard log, where its package is installed."""

from pathlib import Path
from typing import TYPE_CHECKING

from stn_fx.bilevel.algorithm import InnerRecord
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.records import EpochRecord, FitResult
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer


class TensorBoard(Callback):
    """Writes one log; the horizontal axis is the number of inner steps.

    Args:
        folder: of the log.

    Raises:
        InputError: tensorboard is not installed.
    """

    first_process_only = True

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("TensorBoard logs need the package tensorboard. Run: pip install tensorboard") from error
        self._writer = SummaryWriter(str(folder))
        self._inner = 0

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        self._inner = result.resumed_at[-1] if result.resumed_at else 0
        self._write_hyperparameters(result)

    def inner_step_ended(self, trainer: "BilevelTrainer", epoch: int, record: InnerRecord) -> None:
        self._inner += 1
        self._writer.add_scalar("loss/base pass", record.loss, self._inner)
        if record.response_loss is not None:
            self._writer.add_scalar("loss/linearized pass", record.response_loss, self._inner)

    def outer_step_ended(self, trainer: "BilevelTrainer", epoch: int, result: FitResult) -> None:
        self._write_hyperparameters(result)

    def epoch_ended(self, trainer: "BilevelTrainer", record: EpochRecord, result: FitResult) -> None:
        self._writer.add_scalar("loss/validation", record.valid_loss, record.inner_step)
        if record.valid_accuracy is not None:
            self._writer.add_scalar("accuracy/validation", record.valid_accuracy, record.inner_step)

    def fit_ended(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        self._writer.close()

    def _write_hyperparameters(self, result: FitResult) -> None:
        point = result.schedule[-1]
        for name, value in point.values.items():
            self._writer.add_scalar(f"hyperparameter/{name}", value, point.inner_step)
            self._writer.add_scalar(f"scale/{name}", point.scales[name], point.inner_step)
