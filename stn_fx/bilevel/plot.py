"""The picture of a run: losses, every family of hyperparameters on its own axis, the scales, and the trust."""

from itertools import groupby
from typing import TYPE_CHECKING, Any

from stn_fx.bilevel.records import FitResult
from stn_fx.bilevel.trust import Trust

if TYPE_CHECKING:  # matplotlib takes half a second to import, and only a finished run needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_INCHES = 2.1
MAX_LEGEND_ROWS = 11
DISTINCT_COLOURS = 10
MAX_RESPONSE_ERROR = 2.0
# A value that starts within this fraction of its range above the lower bound lives on a logarithmic scale.
NEAR_LOWER_BOUND = 0.02


def draw(result: FitResult, specs: list[dict[str, Any]]) -> "Figure":
    """Draw a run with at least one finished epoch.

    Args:
        result: the run.
        specs: `stn.hparams.specs()`.
    """
    from matplotlib.figure import Figure

    families = [list(group) for _, group in groupby(specs, key=lambda spec: (spec["entry"], spec["component"]))]
    measured = any(record.trust for record in result.history)
    panels = len(families) + 2 + measured
    figure = Figure(figsize=(9.5, PANEL_INCHES * panels + 0.6), dpi=130, layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    colours = _colours([spec["name"] for spec in specs])

    _draw_losses(axes[0], result)
    for panel, family in zip(axes[1:], families, strict=False):
        _draw_family(panel, result, family, colours)
    _draw_scales(axes[len(families) + 1], result, colours)
    if measured:
        _draw_response_errors(axes[-1], result, colours)
    axes[-1].set_xlabel("epoch")
    for panel in axes:
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_losses(panel: "Axes", result: FitResult) -> None:
    epochs = [record.epoch for record in result.history]
    panel.plot(epochs, [record.train_loss for record in result.history], color="0.55", label="training (base pass)")
    responses = [(r.epoch, r.response_loss) for r in result.history if r.response_loss is not None]
    if responses:
        panel.plot(*zip(*responses, strict=True), color="0.55", linestyle=":", label="training (linearized pass)")
    panel.plot(epochs, [record.valid_loss for record in result.history], color="tab:red", label="validation")
    best = result.best
    assert best is not None, "drawn after at least one epoch"
    panel.plot(
        best.epoch, best.valid_loss, "o", color="tab:red", label=f"best: {best.valid_loss:.4g}, epoch {best.epoch}"
    )
    panel.set_ylabel("loss")
    if min(min(r.train_loss, r.valid_loss) for r in result.history) > 0:
        _logarithmic(panel)
    _legend(panel)


def _draw_family(panel: "Axes", result: FitResult, family: list[dict[str, Any]], colours: dict[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = _epochs(result)
    for spec in family:
        values = [point.values[spec["name"]] for point in result.schedule]
        panel.plot(epochs, values, color=colours[spec["name"]], label=spec["name"], drawstyle="steps-post")
    lowest = min(spec["initial"] - spec["low"] for spec in family)
    width = min(spec["high"] - spec["low"] if spec["high"] is not None else float("inf") for spec in family)
    everything = [point.values[spec["name"]] for point in result.schedule for spec in family]
    if lowest < NEAR_LOWER_BOUND * width and min(everything) > 0:
        _logarithmic(panel)
    elif all(spec["discrete"] for spec in family):
        panel.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first = family[0]
    several = first["name"] == f"{first['entry']}.{first['component']}"
    panel.set_ylabel(f"{first['entry']}: {first['component']}" if several else first["entry"].replace("_", " "))
    _legend(panel)


def _draw_scales(panel: "Axes", result: FitResult, colours: dict[str, Any]) -> None:
    epochs = _epochs(result)
    for name, colour in colours.items():
        panel.plot(epochs, [point.scales[name] for point in result.schedule], color=colour)
    panel.set_ylabel("scale (raw space)")
    panel.annotate("colours as above", (1.01, 0.96), xycoords="axes fraction", fontsize=7, va="top")


def _draw_response_errors(panel: "Axes", result: FitResult, colours: dict[str, Any]) -> None:
    """How wrong the responses are; the line at 1 is no better than no response, see `stn_fx.bilevel.trust`."""
    for name, colour in colours.items():
        trust = [(record.epoch, (record.trust or {}).get(name, Trust())) for record in result.history]
        known = [(epoch, each.response_error) for epoch, each in trust if each.response_error is not None]
        errors = [(epoch, min(error, MAX_RESPONSE_ERROR)) for epoch, error in known]
        if errors:
            panel.plot(*zip(*errors, strict=True), color=colour, marker=".", markersize=4)
    panel.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
    panel.set_ylim(0, 1.04 * MAX_RESPONSE_ERROR)
    panel.set_ylabel("response error")
    panel.annotate(
        "0 exact, 1 no better\nthan none, at the\ntop: 2 and more",
        (1.01, 0.96),
        xycoords="axes fraction",
        fontsize=7,
        va="top",
    )


def _epochs(result: FitResult) -> list[float]:
    """Position of every schedule point on the axis of epochs."""
    steps_per_epoch = result.history[-1].inner_step / result.history[-1].epoch
    return [point.inner_step / steps_per_epoch for point in result.schedule]


def _colours(names: list[str]) -> dict[str, Any]:
    """One colour for each hyperparameter; many of them (one per layer) run through a colour map in their order."""
    from matplotlib import colormaps

    if len(names) <= DISTINCT_COLOURS:
        return {name: colormaps["tab10"](position) for position, name in enumerate(names)}
    return {name: colormaps["turbo"](position / (len(names) - 1)) for position, name in enumerate(names)}


def _logarithmic(panel: "Axes") -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, position: f"{value:g}"))
    panel.yaxis.set_minor_formatter(FuncFormatter(lambda value, position: ""))


def _legend(panel: "Axes") -> None:
    columns = -(-len(panel.get_lines()) // MAX_LEGEND_ROWS)
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), fontsize=7, frameon=False, ncols=columns)
