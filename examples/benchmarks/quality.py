"""Does tuning in one run beat searching?  Fixed values, random search, TPE, ASHA, STN and Delta-STN at equal compute.

    pip install -e ".[examples,benchmarks]"
    python examples/benchmarks/quality.py run --data ~/data --jobs 2      # four hours; stop and start it as you like
    python examples/benchmarks/quality.py run --data ~/data --jobs 2 --variants      # other settings: two more
    python examples/benchmarks/quality.py run --data ~/data --tasks fashion --methods random tpe
    python examples/benchmarks/quality.py report                          # CSV and PNG of what is there

Two tasks: the papers' SimpleCNN on 10,000 images of Fashion-MNIST, and a small ResNet of timm on 5,000 images of
CIFAR-10 (JPEG).  Compute is counted in training updates of the plain model; a step of a tuner costs what `costs`
measured it to.  A plain run is one trial of a search.  Every run is read at its epoch with the lowest validation loss,
every search at its best trial, and the test loss only there.
"""

import argparse
import json
import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from quality_costs import measure_costs
from quality_methods import COMPARED, METHODS, SEARCHES, SEEDS, jobs, perform
from quality_report import write_report
from quality_tasks import TASKS
from quality_training import Cost
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

RESULTS = Path(__file__).parent / "results" / "quality"


def run(options: argparse.Namespace, console: Console) -> None:
    """All jobs that are not done, in processes of one thread each."""
    costs = read_costs(options.out)
    todo = [
        job
        for job in jobs(options.tasks, options.methods)
        if job.method == "random"
        or (job.seed in options.seeds and (job.method in SEARCHES or job.start in options.starts))
    ]
    context = multiprocessing.get_context("spawn")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ProcessPoolExecutor(options.jobs, context) as pool:
        line = progress.add_task("jobs", total=len(todo))
        started = time.monotonic()
        futures = {pool.submit(perform, job, options.out, options.data, costs[job.task]): job for job in todo}
        try:
            for future in as_completed(futures):
                future.result()
                job, minutes = futures[future], (time.monotonic() - started) / 60
                progress.console.print(f"{minutes:6.1f} min  {job.folder}")
                progress.advance(line)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()  # the trainer takes SIGTERM as the end of one run only
            raise SystemExit("Interrupted. The same command goes on behind the runs that are done.") from None


def _interrupt(_signal: int, _frame: object) -> None:
    """SIGTERM as Ctrl-C, so that no process of a run outlives it."""
    raise KeyboardInterrupt


def read_costs(out: Path) -> dict[str, dict[str, Cost]]:
    """Costs of the steps of each task; they are part of the results, so that another machine counts alike."""
    path = out / "costs.json"
    if not path.exists():
        raise SystemExit(f"There is no {path}. Measure first: quality.py costs, on a machine with nothing else to do.")
    content = json.loads(path.read_text())
    return {task: {name: Cost(**cost) for name, cost in each.items()} for task, each in content.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("costs", "run", "report"))
    parser.add_argument("--data", type=Path, help="folder that holds fashion-mnist and cifar10-jpeg")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="those that are compared, unless told otherwise")
    parser.add_argument("--variants", action="store_true", help="the variants of Delta-STN too")
    parser.add_argument("--starts", nargs="+", default=[start for task in TASKS.values() for start in task.starts])
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=list(SEEDS), help="random: all trials")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    options = parser.parse_args()
    if options.methods is None:
        options.methods = list(METHODS if options.variants else COMPARED)
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "report":
        write_report(options.out, options.tasks, console)
        return
    if options.data is None:
        parser.error("--data is needed: the folder that holds fashion-mnist and cifar10-jpeg")
    if options.what == "run":
        signal.signal(signal.SIGTERM, _interrupt)
        run(options, console)
        return
    measured = {
        name: {step: asdict(cost) for step, cost in measure_costs(TASKS[name], options.data, console).items()}
        for name in options.tasks
    }
    (options.out / "costs.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
