"""What the zoo measures on one model: conversion, coverage, the oracles, and the cost of a training update.

All times are of the processor on one thread, so that other work on the machine does not count.
"""

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from step_cost import peak_bytes, sgd
from torch import nn
from torch.utils import _pytree as pytree
from zoo_models import Entry, Prepared

import stn_fx
from stn_fx.errors import StnError, UnknownHyperparameterError
from stn_fx.rules import Registry
from stn_fx.verify.check import least_precision, make_trial, run_oracles
from stn_fx.verify.judge import floating
from stn_fx.verify.oracles import weighted_sum
from stn_fx.verify.result import OracleResult
from stn_fx.verify.subject import Inputs, cast, randomise_constants, randomise_response, split_inputs

HPARAMS = ("dropout(shared), drop_path(shared), weight_decay", "dropout(shared), weight_decay", "weight_decay")
"""The first that has a place in the model: one rate for all dropouts, however many there are."""
ENOUGH = 0.95
TIMED_SECONDS = 0.1
VALUES, GRADIENTS = 1e-6, 1e-4
"""Largest relative errors that pass in float64."""


@dataclass
class Row:
    """One line of the table; empty where a model did not come that far."""

    library: str
    model: str
    verdict: str = ""
    """pass, partly (right, but less than 95 % conditioned), refused, WRONG, crash, time or memory."""
    reason: str = ""
    reduced: str = ""
    parameters: int | None = None
    captured: str = ""
    convert_seconds: float | None = None
    export_seconds: float | None = None
    convert_ratio: float | None = None
    nodes: int | None = None
    conditioned: float | None = None
    not_conditioned: str = ""
    sites: str = ""
    precision: str = ""
    unchanged: float | None = None
    response_pass: float | None = None
    linearized_pass: float | None = None
    training_graph: float | None = None
    sites_wrong: float | None = None
    response_gradients: float | None = None
    hypergradients: float | None = None
    update_ratio: float | None = None
    memory_ratio: float | None = None
    seconds: float | None = None


_COLUMNS = {
    "response pass": "response_pass",
    "linearized pass": "linearized_pass",
    "training graph": "training_graph",
    "sites": "sites_wrong",
    "gradients of the response": "response_gradients",
    "gradients of the hyperparameters": "hypergradients",
}


def measure(entry: Entry, full_depth: bool, send: Callable[[dict[str, Any]], None]) -> None:
    """Measure one model; ``send`` gets the row after every step, so that one that is cut short leaves what it has."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    row, start = Row(entry.library, entry.name), time.process_time()

    def report() -> None:
        row.seconds = round(time.process_time() - start, 1)
        send(asdict(row))

    try:
        _measure(entry.prepare(full_depth), row, report)
    except StnError as error:
        row.verdict, row.reason = "refused", f"{type(error).__name__}: {_one_line(error)}"
    except Exception as error:
        row.verdict, row.reason = "crash", f"{type(error).__name__}: {_one_line(error)}"
    report()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]


def _measure(prepared: Prepared, row: Row, report: Callable[[], None]) -> None:
    row.reduced = prepared.reduced
    row.parameters = sum(p.numel() for p in prepared.model.parameters())
    for dtype in (torch.float64, torch.float32):
        model, inputs = prepared.model.to(dtype).train(), cast(split_inputs(prepared.inputs), dtype)
        randomise_constants(model, torch.Generator().manual_seed(0))
        enlarge_small_weights(model)
        try:
            stn = _convert(model, inputs, prepared.rules, row)
            break
        except stn_fx.errors.CaptureError:  # some models run in nothing but float32
            if dtype == torch.float32:
                raise
    compiled = stn.compiled
    row.captured = "yes"
    assert row.convert_seconds is not None
    assert row.export_seconds is not None
    row.convert_ratio = row.convert_seconds / row.export_seconds
    row.nodes = sum(len(g.graph.nodes) for g in (compiled.captured.training, compiled.captured.evaluation))
    row.conditioned = stn.report.conditioned_share
    row.not_conditioned = _reasons(stn)
    row.sites = ", ".join(f"{count} {kind}" for kind, count in Counter(s.entry for s in compiled.plan.sites).items())
    report()
    _judge(stn, inputs, row)
    report()
    row.update_ratio, row.memory_ratio = _update_cost(stn, inputs)


@torch.no_grad()
def enlarge_small_weights(model: nn.Module) -> None:
    """Weights of 0.02 in layers of 32 make attention uniform and hide what is behind it: scale them up."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            usual = math.sqrt(parameter.shape[0] / parameter.numel())
            deviation = float(parameter.std())
            if 0 < deviation < usual / 3:
                parameter.mul_(usual / deviation)


@contextmanager
def _exports_timed() -> Iterator[list[float]]:
    """Seconds of every ``torch.export.export`` that is called meanwhile."""
    seconds: list[float] = []
    export = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return export(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    torch.export.export = timed
    try:
        yield seconds
    finally:
        torch.export.export = export


def _convert(model: nn.Module, inputs: Inputs, rules: Registry | None, row: Row) -> stn_fx.SelfTuningModule:
    args, kwargs = inputs
    for hparams in HPARAMS:
        start = time.process_time()
        try:
            with _exports_timed() as exports:
                return stn_fx.transform(model, hparams, kwargs or args, rules=rules, seed=0)
        except UnknownHyperparameterError:
            continue
        finally:
            row.convert_seconds = time.process_time() - start
            row.export_seconds = sum(exports[-2:])  # those of the batch axis that was found, in both modes
    raise AssertionError("weight decay fits every model")


def _reasons(stn: stn_fx.SelfTuningModule) -> str:
    """Why parameters are not conditioned, the largest first, alike ones together."""
    scalars: Counter[str] = Counter()
    example: dict[str, str] = {}
    for plan in stn.compiled.plan.parameters:
        if not plan.conditioned:
            scalars[plan.reason] += plan.scalars
            example.setdefault(plan.reason, plan.name)
    return "; ".join(f"{example[reason]} ...: {reason}" for reason, _ in scalars.most_common(3))


def _judge(stn: stn_fx.SelfTuningModule, inputs: Inputs, row: Row) -> None:
    generator = torch.Generator().manual_seed(1)
    precision = least_precision(stn.compiled.captured.evaluation.graph)
    randomise_response(stn, generator)
    args, kwargs = inputs
    batch = stn.compiled.captured.batch_size(pytree.tree_leaves((args, kwargs)))
    found = run_oracles(make_trial(stn, inputs, batch, precision, generator), precision)
    row.precision = found.precision
    for name, error in found.errors.items():
        if name in _COLUMNS:
            setattr(row, _COLUMNS[name], error)
    row.unchanged = max(error or 0.0 for name, error in found.errors.items() if name.startswith("unchanged"))
    wrong = [
        f"{each.name} {each.error:.1e} {each.note}".strip() for each in found.oracles if not _holds(each, precision)
    ]
    if wrong:
        row.verdict, row.reason = "WRONG", "; ".join(wrong)
    elif (row.conditioned or 0.0) < ENOUGH:
        row.verdict, row.reason = "partly", row.not_conditioned
    else:
        row.verdict = "pass"
        row.reason = "; ".join(each.note for each in found.oracles if each.note)


def _holds(result: OracleResult, precision: torch.dtype) -> bool:
    """Within the zoo's limits in float64: batch norms over two examples amplify rounding more than a usual batch."""
    limit = result.tolerance
    if precision == torch.float64 and limit > 0:
        limit = GRADIENTS if result.name.startswith("gradients") else VALUES
    return result.error is None or result.error <= limit


def _update_cost(stn: stn_fx.SelfTuningModule, inputs: Inputs) -> tuple[float, float]:
    """Time and peak memory of base + linearized update relative to an ordinary one, on this small batch."""
    args, kwargs = inputs
    stn.train()
    batch = stn.compiled.captured.batch_size(pytree.tree_leaves((args, kwargs)))
    raw_BH = stn.hparams.sample(batch).detach()

    def ordinary() -> None:
        optimizer = sgd(list(stn.base_parameters()))
        weighted_sum(floating(stn.model(*args, **kwargs))).backward()
        optimizer.step()
        optimizer.zero_grad()

    def both() -> None:
        optimizer, responses = sgd(list(stn.base_parameters())), sgd(list(stn.response_parameters()))
        weighted_sum(floating(stn(*args, **kwargs))).backward()
        primal, tangent = stn.linearize(*args, raw=raw_BH, **kwargs)
        weighted_sum([p + t for p, t in zip(floating(primal), floating(tangent), strict=True)]).backward()
        for each in (optimizer, responses):
            each.step()
            each.zero_grad()

    ordinary(), both()
    seconds = {ordinary: 0.0, both: 0.0}
    while seconds[ordinary] < TIMED_SECONDS:
        for update in seconds:
            start = time.process_time()
            update()
            seconds[update] += time.process_time() - start
    ratio = seconds[both] / seconds[ordinary]
    return ratio, peak_bytes(both) / peak_bytes(ordinary)
