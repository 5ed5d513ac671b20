"""What `stn-fx tune` was asked for, as data: kept in the run folder, so that a run can be taken up and replayed."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stn_fx.bilevel.apply import UpdateOptions
from stn_fx.bilevel.atomic import write_atomically
from stn_fx.bilevel.comparison import Recipe
from stn_fx.bilevel.optimizers import CORRECTED_RMSPROP
from stn_fx.bilevel.response_step import EVERY, FRACTION, usual_step
from stn_fx.data.sources import DIGITS
from stn_fx.errors import InputError
from stn_fx.model_reference import path_of

from .options import DEFAULT_LR, OPTIMIZERS, SCHEDULES, OptimizerName, ScheduleName

FILE = "options.json"


@dataclass(frozen=True)
class TuneOptions:
    """Options of the command under their own names, see `stn-fx tune --help`."""

    model: str
    hparams: str
    data: str
    epochs: int
    batch_size: int
    optimizer: OptimizerName
    lr: float | None
    schedule: ScheduleName
    image_size: int | None
    examples: int | None
    valid_fraction: float
    seed: int
    split_seed: int
    device: str
    model_arg: list[str]
    response: str
    warmup: int | None
    train_steps: int
    valid_steps: int
    hyper_lr: float
    response_lr: float | None
    entropy_weight: float
    save_every: int | None
    compare: bool
    # Later additions: with what a run did before they were there, so that its folder is still read.
    accumulate: int = 1
    clip_norm: float | None = None
    bf16: bool = False
    average: float | None = None
    keep: int = 2
    tensorboard: bool = False
    trust: bool = True
    response_every: int = EVERY
    response_fraction: float = FRACTION

    @staticmethod
    def of(values: Mapping[str, Any]) -> "TuneOptions":
        """From a mapping that has all of them without a default, and maybe more."""
        own = {
            field.name: values[field.name]
            for field in fields(TuneOptions)
            if field.name in values or field.default is MISSING
        }
        converted = {
            "optimizer": OptimizerName(own["optimizer"]),
            "schedule": ScheduleName(own["schedule"]),
            "model_arg": list(own["model_arg"] or []),
        }
        return TuneOptions(**own | converted)

    @staticmethod
    def read(folder: Path) -> "TuneOptions":
        """Those of a run folder.

        Raises:
            InputError: the folder holds no run of this command, or one of another version.
        """
        try:
            return TuneOptions.of(json.loads((folder / FILE).read_text()))
        except OSError as error:
            raise InputError(
                f"{folder} holds no run of `stn-fx tune` ({FILE}: {error.strerror}). Give the run folder that the "
                f"command printed when it began."
            ) from error
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"{folder / FILE} is not of this version of stn-fx ({error}). Begin a new run.") from error

    def write(self, folder: Path) -> None:
        """Keep them in a run folder; paths become absolute, so that they hold from everywhere."""
        kept = asdict(self) | {"model": _absolute_model(self.model), "data": _absolute_data(self.data)}
        text = json.dumps(kept, indent=2) + "\n"
        write_atomically(folder / FILE, lambda path: path.write_text(text))

    def recipe(self) -> Recipe:
        """How both runs are trained."""
        lr = DEFAULT_LR[self.optimizer] if self.lr is None else self.lr
        response_lr = lr if self.response_lr is None else self.response_lr
        return Recipe(
            epochs=self.epochs,
            warmup_epochs=self.warmup,
            train_steps=self.train_steps,
            valid_steps=self.valid_steps,
            options={
                "base_optimizer": partial(OPTIMIZERS[self.optimizer], lr=lr),
                "response_optimizer": partial(OPTIMIZERS[self.optimizer], lr=response_lr),
                "hyper_optimizer": partial(CORRECTED_RMSPROP, lr=self.hyper_lr),
                "scale_optimizer": partial(CORRECTED_RMSPROP, lr=self.hyper_lr),
                "response_step": usual_step(self.response_every, self.response_fraction),
                "entropy_weight": self.entropy_weight,
                "updates": UpdateOptions(
                    accumulate=self.accumulate,
                    clip_norm=self.clip_norm,
                    autocast=torch.bfloat16 if self.bf16 else None,
                ),
            },
            schedule=SCHEDULES[self.schedule],
            measure_trust=self.trust,
        )


def _absolute_data(reference: str) -> str:
    return reference if reference == DIGITS else str(Path(reference).expanduser().resolve())


def _absolute_model(reference: str) -> str:
    path, separator, name = path_of(reference)
    return f"{Path(path).expanduser().resolve()}{separator}{name}" if path else reference
