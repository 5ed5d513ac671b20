"""A classification of images as a task that can be run many times: same split, any seed, tuned or fixed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stn_fx.bilevel.algorithm import evaluation_mode
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.comparison import Recipe, Run, fixed_run, tuned_run
from stn_fx.data import Splits, image_batches
from stn_fx.errors import InputError
from stn_fx.transform import ResponseForm, SelfTuningModule, transform

CPU = torch.device("cpu")


@dataclass(frozen=True)
class ImageTask:
    """Everything that a tuned and a fixed run have in common.

    Attributes:
        build: makes the untrained model; called after torch's seed was set.
        splits: images of the size and with the channels that the model takes.
        hparams: as for `stn_fx.transform`.
        response: as for `stn_fx.transform`.
        batch_size: B, for training; validation has larger batches, see `image_batches`.
        device: of model and batches.
    """

    build: Callable[[], nn.Module]
    splits: Splits
    hparams: str
    response: ResponseForm = "rowwise"
    batch_size: int = 64
    device: torch.device = CPU

    def tuned(
        self, recipe: Recipe, seed: int, callbacks: Sequence[Callback] = (), resume_from: Path | None = None
    ) -> Run:
        """Train with tuning; the seed is that of the weights, the order of the data, masks and perturbations."""
        loaders = image_batches(self.splits, self.batch_size, seed)
        parts = (loaders.train, loaders.valid, loaders.test)
        return tuned_run(self.wrapped(seed), recipe, *parts, callbacks, resume_from)

    def fixed(
        self, recipe: Recipe, seed: int, callbacks: Sequence[Callback] = (), resume_from: Path | None = None
    ) -> Run:
        """Train at the initial hyperparameters, without a response; else as `tuned`."""
        loaders = image_batches(self.splits, self.batch_size, seed)
        parts = (loaders.train, loaders.valid, loaders.test)
        return fixed_run(replace(self, response=None).wrapped(seed), recipe, *parts, callbacks, resume_from)

    def wrapped(self, seed: int) -> SelfTuningModule:
        """A new, untrained model, captured with a batch of the training data.

        Raises:
            InputError: the model cannot take these images, or has not one score for each class.
            StnError: as `stn_fx.transform` does.
        """
        torch.manual_seed(seed)
        model = self.build().to(self.device)
        batches = image_batches(self.splits, self.batch_size, seed).train
        x, _ = next(iter(batches))
        x = x.to(self.device)
        self._check_scores(model, x)
        image_format = batches.normalisation.image_format
        return transform(model, self.hparams, (x,), response=self.response, seed=seed, image_format=image_format)

    @torch.no_grad()
    def _check_scores(self, model: nn.Module, x: Tensor) -> None:
        """One evaluation of the plain model, so that what does not fit is told before anything is captured."""
        shape, classes = tuple(x.shape[1:]), len(self.splits.classes)
        try:
            with evaluation_mode(model):
                scores = model(x)
        except Exception as error:  # whatever a user's model raises
            raise InputError(
                f"The model cannot take images of shape {shape} (channels, height, width): {type(error).__name__}: "
                f"{error}. Choose another image size, or build the model for this one."
            ) from error
        if not isinstance(scores, Tensor) or scores.ndim != 2 or scores.shape[1] < classes:
            got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise InputError(
                f"The model's output for {len(x)} images is {got}; one score for each of the {classes} classes is "
                f"needed, shape ({len(x)}, {classes}). Build the model with that number of outputs."
            )
