"""Bilevel training: inner and outer steps, the trainer around them, and what a run leaves behind.

The way of the data: a loader's batch -> `Objective.batch` -> the updates of one `Algorithm` -> records -> `FitResult`
-> `RunFolder`.
"""

from stn_fx.bilevel.algorithm import Algorithm, InnerRecord, OuterRecord
from stn_fx.bilevel.apply import UpdateOptions
from stn_fx.bilevel.callbacks import Callback, KeepBest, SafePoint
from stn_fx.bilevel.checkpoint import Checkpoint
from stn_fx.bilevel.evaluation import Evaluation, evaluate
from stn_fx.bilevel.follow_schedule import FollowSchedule, replay
from stn_fx.bilevel.interruption import Terminated
from stn_fx.bilevel.live_progress import LiveProgress
from stn_fx.bilevel.objective import Objective
from stn_fx.bilevel.recorded_run import RecordedRun, read_run
from stn_fx.bilevel.records import EpochRecord, FitResult, SchedulePoint
from stn_fx.bilevel.response_step import EveryKth, Linearized, OnFraction, WithoutLinearization
from stn_fx.bilevel.run_folder import RunFolder
from stn_fx.bilevel.sampling import GlobalSampling, PerBatch, PerExample, PerGroup
from stn_fx.bilevel.schedules import LearningRateSchedule, cosine
from stn_fx.bilevel.shared_forward import SharedForward
from stn_fx.bilevel.steps import DeltaSTN, FixedHyperparameters
from stn_fx.bilevel.stn import STN
from stn_fx.bilevel.tensorboard import TensorBoard
from stn_fx.bilevel.trainer import BilevelTrainer
from stn_fx.bilevel.trust import Trust
from stn_fx.bilevel.verdict import Verdict, verdicts
from stn_fx.bilevel.weight_average import WeightAverage

__all__ = [
    "STN",
    "Algorithm",
    "BilevelTrainer",
    "Callback",
    "Checkpoint",
    "DeltaSTN",
    "EpochRecord",
    "Evaluation",
    "EveryKth",
    "FitResult",
    "FixedHyperparameters",
    "FollowSchedule",
    "GlobalSampling",
    "InnerRecord",
    "KeepBest",
    "LearningRateSchedule",
    "Linearized",
    "LiveProgress",
    "Objective",
    "OnFraction",
    "OuterRecord",
    "PerBatch",
    "PerExample",
    "PerGroup",
    "RecordedRun",
    "RunFolder",
    "SafePoint",
    "SchedulePoint",
    "SharedForward",
    "TensorBoard",
    "Terminated",
    "Trust",
    "UpdateOptions",
    "Verdict",
    "WeightAverage",
    "WithoutLinearization",
    "cosine",
    "evaluate",
    "read_run",
    "replay",
    "verdicts",
]
