"""A small real run that a test can kill: `python resumable_run.py FOLDER KILL_AFTER` trains, and resumes where it can.

Everything that draws is in it: dropout and cutout masks, perturbations, a shuffling loader without a generator of its
own, one with, augmentation from Python's, NumPy's and torch's global generators.
"""

import os
import random
import signal
import sys
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset

import stn_fx
from stn_fx.bilevel import BilevelTrainer, Callback, Checkpoint, KeepBest, LearningRateSchedule
from stn_fx.bilevel.checkpoint_file import checkpoints_in

EPOCHS = 4


class NoisyImages(Dataset):
    """Images that come out differently each time."""

    def __init__(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 1, 8, 8, generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        factor = random.uniform(0.9, 1.1) + 0.1 * numpy.random.rand()
        return factor * self.images[index] + 0.1 * torch.randn(1, 8, 8), self.labels[index]


class KillAfter(Callback):
    """SIGKILL after so many inner steps: nothing of the process can react."""

    def __init__(self, steps, number=signal.SIGKILL):
        self.steps, self.number, self.done = steps, number, 0

    def inner_step_ended(self, trainer, epoch, record):
        self.done += 1
        if self.done == self.steps:
            os.kill(os.getpid(), self.number)


def make_trainer(workers=0):
    torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(144, 3)
    )
    stn = stn_fx.transform(model, "dropout,cutout,weight_decay", (torch.randn(8, 1, 8, 8),), seed=3)
    train = DataLoader(NoisyImages(0, 72), 8, shuffle=True, num_workers=workers)
    valid = DataLoader(NoisyImages(1, 40), 16, shuffle=True, generator=torch.Generator().manual_seed(5))
    return BilevelTrainer(stn, train=train, valid=valid, base_optimizer=lambda parameters: Adam(parameters, lr=1e-3))


def run(folder, *callbacks, every_steps=4, workers=0):
    """Train from the latest checkpoint in the folder, or from the start; returns trainer, result and best state."""
    trainer, keep = make_trainer(workers), KeepBest()
    checkpoint = Checkpoint(folder, every_steps=every_steps)
    result = trainer.fit(
        EPOCHS,
        warmup_epochs=1,
        train_steps=3,
        callbacks=[keep, LearningRateSchedule(), checkpoint, *callbacks],
        resume_from=folder if checkpoints_in(Path(folder)) else None,
    )
    return trainer, result, keep


if __name__ == "__main__":
    run(sys.argv[1], KillAfter(int(sys.argv[2])))
