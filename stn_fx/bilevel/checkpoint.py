"""`Checkpoint`: the callback that saves a run while it goes on, so that it can be taken up where it was."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from stn_fx.arguments import require_count
from stn_fx.bilevel.callbacks import Callback, SafePoint
from stn_fx.bilevel.checkpoint_file import checkpoint_path, checkpoints_in, folder_of, require_plain, write_checkpoint
from stn_fx.bilevel.records import FitResult
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.bilevel.trainer import BilevelTrainer


class Checkpoint(Callback):
    """Saves everything after every epoch, when the run is interrupted, and as often as asked for.

    A run that is resumed from any of its checkpoints (`trainer.fit(..., resume_from=folder)`) gives on CPU bit for bit
    the results of one that was never stopped. While updates are being skipped because they are not finite nothing is
    saved: the last checkpoint is a good one.

    Args:
        folder: made with its parents.
        keep: how many of the last ones stay.
        every_steps: save after so many inner steps as well; None = after every epoch only.
        overwrite: whether checkpoints of another run there may be removed.

    Raises:
        InputError: an option is out of range, or (at the start of `fit`) the folder holds another run's checkpoints.
    """

    def __init__(
        self, folder: str | Path, keep: int = 2, every_steps: int | None = None, overwrite: bool = False
    ) -> None:
        for name, value in (("keep", keep), ("every_steps", every_steps)):
            if value is not None:
                require_count(name, value)
        self.folder = Path(folder)
        self.keep = keep
        self.every_steps = every_steps
        self.overwrite = overwrite
        self._checked = False

    def check(self, trainer: "BilevelTrainer", result: FitResult) -> None:
        place = folder_of(self.folder, trainer.algorithm.replicas)
        if checkpoints_in(place) and not _is_in(result.resumed_from, place) and not self.overwrite:
            raise InputError(
                f"{place} holds checkpoints of a run already. Resume it with resume_from={str(place)!r}, "
                f"choose another folder, or allow it to be overwritten."
            )
        for name, loader in (("training", trainer.train), ("validation", trainer.valid)):
            if getattr(loader, "persistent_workers", False):
                warnings.warn(
                    f"The {name} loader has persistent workers, and what is drawn in them is not saved: where its data "
                    f"set draws random numbers, a resumed run draws others than one that was not interrupted. With "
                    f"persistent_workers=False both are the same.",
                    stacklevel=4,
                )

    def fit_started(self, trainer: "BilevelTrainer", epochs: int, result: FitResult) -> None:
        replicas = trainer.algorithm.replicas
        self._place = folder_of(self.folder, replicas)
        # Between two processes' writes of a step, the step before is the last that both have.
        self._kept = max(self.keep, min(2, replicas.count))
        self._place.mkdir(parents=True, exist_ok=True)
        self._goes_on_from = result.resumed_from
        self._cleared = False

    def safe_point(self, trainer: "BilevelTrainer", point: SafePoint) -> None:
        if not self._checked:  # what cannot be stored is told after the first step, not after the first epoch
            require_plain(point.state())
            self._checked = True
        if not self._cleared:  # not before the run has taken its first step: until then nothing may be lost
            self._clear(point)
        due = self.every_steps is not None and point.inner_step % self.every_steps == 0
        if (due or point.epoch_ended or point.stopping) and point.healthy():
            write_checkpoint(checkpoint_path(self._place, point.inner_step), point.identity(), point.state())
            for old in checkpoints_in(self._place)[: -self._kept]:
                old.unlink()

    def _clear(self, point: SafePoint) -> None:
        """Remove what is of another run, or of the steps that are done again."""
        resumed, self._cleared = self._goes_on_from, True
        for half_written in self._place.glob(".step-*.pt"):
            half_written.unlink()
        for path in checkpoints_in(self._place):
            if resumed is None or not _is_in(resumed, self._place) or path.name > resumed.name:
                path.unlink()


def _is_in(path: Path | None, folder: Path) -> bool:
    return path is not None and path.parent.resolve() == folder.resolve()
