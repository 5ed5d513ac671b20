"""`stn-fx replay`: the plain model from scratch at the hyperparameters that a run found."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stn_fx.bilevel.follow_schedule import FollowSchedule
from stn_fx.bilevel.live_progress import LiveProgress
from stn_fx.bilevel.recorded_run import RecordedRun, read_run
from stn_fx.bilevel.records import SchedulePoint
from stn_fx.bilevel.run_folder import RunFolder

from .tables import replay_table, write_comparison
from .tune_options import TuneOptions
from .tune_task import image_task


class Way(StrEnum):
    """Values of --along."""

    SCHEDULE = "schedule"
    FINAL = "final"
    START = "start"
    PERTURBED = "perturbed"


def replay(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, as `stn-fx tune` printed it.")],
    along: Annotated[
        list[Way] | None,
        typer.Option(
            help="Follow the whole schedule, or hold its final or start values, or the final ones with "
            "noise of their scales; repeatable. All by default."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of weights, data order and masks; else that of the run.")
    ] = None,
) -> None:
    """Train the model of a run from scratch along its schedule, by the base pass alone.

    No response is learned and nothing is tuned: what the found values are worth by themselves, to be compared with the
    values at the start.
    """
    console, recorded, options = Console(), read_run(run), TuneOptions.read(run)
    seed = options.seed if seed is None else seed
    task, recipe = image_task(console, options), options.recipe()
    runs = {}
    for way in along or list(Way):
        following = FollowSchedule(points(recorded, way), perturbed=way is Way.PERTURBED, seed=seed)
        place = run / "replay" / way
        callbacks = [LiveProgress(console, way), following, RunFolder(place, overwrite=True)]
        runs[str(way)] = task.fixed(recipe, seed, callbacks)
    console.print(replay_table(runs, options.epochs))
    write_comparison(run / "replay.csv", runs)
    console.print(
        f"Written to {run / 'replay.csv'}, weights and losses to {run / 'replay'}", soft_wrap=True, markup=False
    )


def points(recorded: RecordedRun, way: Way) -> list[SchedulePoint]:
    """The part of the schedule to follow."""
    schedule = recorded.result.schedule
    return {Way.SCHEDULE: schedule, Way.START: schedule[:1]}.get(way, schedule[-1:])
