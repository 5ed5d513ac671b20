"""`BilevelTrainer`: epochs of inner and outer steps over any two loaders, with a record of all that happened."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch.nn.functional as F

from stn_fx.arguments import require_count
from stn_fx.bilevel.algorithm import Algorithm
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.evaluation import Evaluation, evaluate
from stn_fx.bilevel.fit import Fit
from stn_fx.bilevel.generators import Generators
from stn_fx.bilevel.objective import Loss, Objective
from stn_fx.bilevel.reader import beside_a_pass, length_of
from stn_fx.bilevel.records import FitResult
from stn_fx.bilevel.steps import DeltaSTN, DeltaSTNOptions
from stn_fx.errors import InputError

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule


TRAIN_STEPS = 5
"""T_train where none is given, as usual in the papers; 2 costs a fifth more and was no better, see
`examples/benchmarks/results/README.md`."""
WARMUP_UPDATES = 500
"""What it takes to learn a response."""


def usual_warmup(epochs: int, updates: int | None) -> int:
    """Warm-up epochs where none are given: as long as a response takes, but a fifth to two fifths of all.

    Args:
        epochs: all of them.
        updates: of the weights in an epoch; None where that is not known, then two fifths.
    """
    most, least = 2 * epochs // 5, epochs // 5
    needed = most if updates is None else math.ceil(WARMUP_UPDATES / max(1, updates))
    return max(min(max(needed, least), most), min(1, epochs - 1))


class BilevelTrainer:
    """Trains a wrapped model and tunes its hyperparameters in one run.

    Args:
        stn: the wrapped model; trained in place.
        loss: `loss(output, target)` or an `Objective`.
        train: iterable of training batches; one pass over it is an epoch.
        valid: iterable of validation batches, of the same structure; started anew whenever it ends.
        algorithm: what the steps do; `DeltaSTN(stn, loss, **options)` where None. Its own loss counts then.
        **options: optimizers and entropy weight, see `DeltaSTN`.

    Raises:
        InputError: an optimizer does not fit, both `algorithm` and its options are given, or `train` and `valid` are
            the same object.
    """

    def __init__(
        self,
        stn: "SelfTuningModule",
        loss: Loss | Objective | None = None,
        *,
        train: Iterable[Any],
        valid: Iterable[Any],
        algorithm: Algorithm | None = None,
        **options: Unpack[DeltaSTNOptions],
    ) -> None:
        if train is valid:
            raise InputError(
                "train and valid are the same loader. Hyperparameters tuned on the training data switch all "
                "regularization off; hold out some examples for validation."
            )
        if isinstance(train, Iterator) or isinstance(valid, Iterator):
            raise InputError(
                "train and valid must be iterable many times, and an iterator ends after one pass. Pass the DataLoader "
                "or a list of batches."
            )
        given = [*options, *([] if loss is None else ["loss"])]
        if algorithm is not None and given:
            raise InputError(
                f"{', '.join(given)}: given beside an algorithm, which has its own. Pass them to the algorithm."
            )
        self.algorithm = algorithm or DeltaSTN(stn, F.cross_entropy if loss is None else loss, **options)
        if self.algorithm.stn is not stn:
            raise InputError("The algorithm was made for another wrapped model. Build both over the same one.")
        self.stn = stn
        self.train = train
        self.valid = valid

    def fit(
        self,
        epochs: int = 50,
        *,
        warmup_epochs: int | None = None,
        train_steps: int = TRAIN_STEPS,
        valid_steps: int = 1,
        callbacks: Sequence[Callback] = (),
        resume_from: str | Path | None = None,
        measure_trust: bool = True,
    ) -> FitResult:
        """Train for a number of epochs.

        Args:
            epochs: passes over the training loader.
            warmup_epochs: epochs at the start without outer steps: the response is learned first, and an undertrained
                model wants no regularization. None = as many as hold 500 updates, but a fifth of all at
                least and two fifths at most, and one where there is more than one.
            train_steps: T_train, inner steps between two rounds of outer steps (the papers' usual choice is 5).
            valid_steps: T_valid, outer steps in a round (1).
            callbacks: called in this order at every event.
            resume_from: a checkpoint that the callback `Checkpoint` wrote, or its folder for the latest one; everything
                else as in the run that wrote it.
            measure_trust: whether to measure once in every epoch how far each hyperparameter can be trusted, see
                `stn_fx.bilevel.trust`. It takes about as long as two updates and does not touch the run.

        Returns:
            The result.

        Raises:
            InputError: an option is out of range, a loader is empty, or batch or loss has the wrong form.
            CheckpointError: the checkpoint cannot be read, or is of another model, version or run.
            DivergedError: too many updates in a row were skipped, because loss or gradient was not finite.
            KeyboardInterrupt: Ctrl-C (or its kind `Terminated`: SIGTERM); raised between two updates, after callbacks
                have seen what there was of the result. A second signal acts at once.
        """
        options = {"epochs": epochs, "train_steps": train_steps, "valid_steps": valid_steps}
        for name, value in options.items():
            require_count(name, value, 1)
        if warmup_epochs is None:
            batches = length_of(self.train)
            updates = None if batches is None else batches // self.algorithm.updates.accumulate
            warmup_epochs = usual_warmup(epochs, updates)
        require_count("warmup_epochs", warmup_epochs, 0)
        if self.algorithm.tunes and warmup_epochs >= epochs:
            raise InputError(
                f"warmup_epochs={warmup_epochs} leaves none of {epochs} epochs for tuning. Lower it, or train longer."
            )
        return Fit(self, epochs, warmup_epochs, train_steps, valid_steps, callbacks, measure_trust).run(resume_from)

    def evaluate(self, loader: Iterable[Any]) -> Evaluation:
        """Mean loss and accuracy of the model as it stands, in evaluation mode and in the precision of the updates.

        A run that goes on is left alone: its generators and its pass over the same loader.
        """
        loaders = {"train": self.train, "valid": self.valid, "evaluated": loader}
        with Generators(self.stn, loaders).untouched(), self.algorithm.precision():
            return evaluate(self.stn, self.algorithm.objective, beside_a_pass(loader))
