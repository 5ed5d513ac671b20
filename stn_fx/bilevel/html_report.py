"""One HTML page about a run, readable without a network: what was found, how far to trust it, pictures and tables."""

import base64
import html
import io
from typing import Any

from stn_fx.bilevel.plot import draw
from stn_fx.bilevel.recorded_run import RecordedRun, require_history
from stn_fx.bilevel.trust import COLLAPSED, Trust, at_bound
from stn_fx.bilevel.verdict import verdicts

LARGE_ERROR = 10

EXPLANATION = (
    "Response error, of the last epoch: how far the change of the training loss that the learned response promises is "
    "from the one it delivers at fresh perturbations; 0 is exact, 1 no better than no response, above 1 worse than "
    "none. Signal to noise: the hypergradient of one validation batch in standard errors; near 0 is good for a value "
    "that has settled, and bad for one that never moved. The verdict looks at the last third of the tuned epochs."
)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem;
       margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
th { text-align: left; color: #666; font-weight: 500 }
td, th { padding: .2rem .9rem .2rem 0; border-bottom: 1px solid #eee }
td { font-variant-numeric: tabular-nums }
img { max-width: 100% }
.note { border-left: 4px solid #d90; padding: .3rem .8rem; margin: .5rem 0; background: #fffaf0 }
"""


def html_report(run: RecordedRun) -> str:
    """The page.

    Raises:
        InputError: no epoch of the run is finished.
    """
    require_history(run)
    notes = trust_notes(run)
    if not notes and all(verdict.trusted for verdict in verdicts(run.result)):
        notes = ["Nothing was found that speaks against it."]
    best = run.result.best
    assert best is not None, "there is an epoch"
    accuracy = "" if best.valid_accuracy is None else f", accuracy {100 * best.valid_accuracy:.1f} %"
    parts = [
        f"<h1>{_text(run.folder.resolve().name)}</h1>",
        f"<p>Lowest validation loss <b>{best.valid_loss:.4g}</b>{accuracy} in epoch {best.epoch} of "
        f"{len(run.result.history)}.</p>",
        "<h2>How far to trust it</h2>",
        *(f'<p class="note">{_text(note)}</p>' for note in notes),
        *_verdict_table(run),
        "<h2>Hyperparameters</h2>",
        _table(["name", "start", "now", "at the best epoch", "scale", "lowest", "highest"], _value_rows(run)),
        "<h2>Schedule</h2>",
        f'<img alt="Schedules, losses and scales" src="data:image/png;base64,{_picture(run)}">',
        "<h2>Epochs</h2>",
        _table(["epoch", "training loss", "response loss", "validation loss", "accuracy", "skipped"], _epoch_rows(run)),
    ]
    head = f"<meta charset='utf-8'><title>{_text(run.folder.resolve().name)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def trust_notes(run: RecordedRun) -> list[str]:
    """What speaks against the result, as sentences: bounds, collapsed scales, skipped updates, too short a run."""
    notes, result = [], run.result
    last = result.schedule[-1]
    for spec in run.specs:
        name, low, high = spec["name"], spec["low"], spec["high"]
        bound = None if spec["discrete"] else at_bound(last.values[name], low, high, spec["initial"])
        if bound == "upper":
            notes.append(f"{name} is at its upper bound {high:g}: a higher one may be better.")
        elif bound == "lower":
            notes.append(f"{name} is at its lower bound {low:g}: the model wants none of it, or noise took it there.")
    collapsed = [name for name, scale in last.scales.items() if scale < COLLAPSED]
    if collapsed:
        notes.append(
            f"Scales below {COLLAPSED:g}: {', '.join(collapsed)}. The response is learned in so small a surrounding "
            f"that their gradients are mostly noise; raise the entropy weight."
        )
    if result.skipped:
        notes.append(f"{result.skipped} updates were skipped because loss or gradient was not finite.")
    if result.interrupted:
        notes.append("The run was interrupted before its last epoch.")
    if result.best is result.history[-1] and len(result.history) > 1:
        notes.append("The last epoch is the best one: the validation loss may fall further in a longer run.")
    if last.outer_step == 0:
        notes.append("There was no outer step: nothing was tuned.")
    return notes


def _verdict_table(run: RecordedRun) -> list[str]:
    """A verdict for each hyperparameter, with the numbers of the last epoch; nothing for runs that measured none."""
    found, last = verdicts(run.result), run.result.history[-1].trust or {}
    if not found:
        return []
    rows = []
    for each in found:
        numbers = last.get(each.name, Trust())
        measured = [_error(numbers.response_error), _number(numbers.hypergradient_signal)]
        rows.append([each.name, "yes" if each.trusted else "not yet", each.words, *measured])
    return [
        _table(["name", "trust it?", "why", "response error", "hypergradient signal to noise"], rows),
        f"<p>{_text(EXPLANATION)}</p>",
    ]


def _value_rows(run: RecordedRun) -> list[list[str]]:
    first, last = run.result.schedule[0], run.result.schedule[-1]
    at_best = (run.summary.get("best_epoch") or {}).get("values") or last.values
    rows = []
    for spec in run.specs:
        name = spec["name"]
        numbers = [first.values[name], last.values[name], at_best[name], last.scales[name], spec["low"], spec["high"]]
        rows.append([name, *(_number(number) for number in numbers)])
    return rows


def _epoch_rows(run: RecordedRun) -> list[list[str]]:
    return [
        [str(each.epoch)]
        + [_number(x) for x in (each.train_loss, each.response_loss, each.valid_loss, each.valid_accuracy)]
        + [str(each.skipped)]
        for each in run.result.history
    ]


def _picture(run: RecordedRun) -> str:
    file = io.BytesIO()
    draw(run.result, run.specs).savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()


def _table(heads: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _error(value: float | None) -> str:
    """A response error; far above 1 it is a ratio to a promise of nearly nothing, whose size says no more."""
    return f"over {LARGE_ERROR:g}" if value is not None and value > LARGE_ERROR else _number(value)


def _text(value: str) -> str:
    return html.escape(value)
