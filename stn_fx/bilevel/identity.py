"""What a checkpoint and the run that goes on from it must agree on, for people to read."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stn_fx.bilevel.algorithm import Algorithm
from stn_fx.bilevel.callbacks import Callback
from stn_fx.bilevel.reader import length_of

RANGE = ("low", "high", "discrete")
"""Of a hyperparameter, without which its raw value means another one."""


def run_identity(
    algorithm: Algorithm,
    callbacks: Sequence[Callback],
    loaders: Mapping[str, Iterable[Any]],
    options: Mapping[str, int],
) -> dict[str, Any]:
    """Plain data; `require_same` names the differences of two.

    Args:
        algorithm: with its model captured.
        callbacks: those with a state.
        loaders: by name.
        options: of the fit.
    """
    stn = algorithm.stn
    tensors = {name: value for name, value in stn.state_dict().items() if isinstance(value, Tensor)}
    specs = {str(spec["name"]): spec for spec in stn.hparams.specs()}
    lengths = {name: length_of(loader) for name, loader in loaders.items()}
    return {
        "model": f"{type(stn.model).__module__}.{type(stn.model).__qualname__}",
        "tensor": {name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for name, t in tensors.items()},
        "hyperparameter": {
            name: {key: spec[key] for key in ("low", "high", "discrete")} for name, spec in specs.items()
        },
        "module": {name or "model": _described(module) for name, module in stn.model.named_modules()},
        "algorithm": algorithm.description(),
        "optimizer": {role: _settings(each) for role, each in algorithm.optimizers.items()},
        "callback": [each.description() for each in callbacks],
        "batches of the loader": {name: batches for name, batches in lengths.items() if batches is not None},
        "option": dict(options),
    }


def _described(module: nn.Module) -> str:
    """Class, and of torch's own what it shows of its settings; others may show what changes in training."""
    settings = module.extra_repr() if type(module).__module__.startswith("torch.nn.") else ""
    return type(module).__qualname__ + (f"({settings})" if settings else "")


def _settings(optimizer: Optimizer) -> dict[str, Any]:
    """Class and plain options, as it was built: schedules change the rates of its groups, not these."""
    plain = {name: value for name, value in optimizer.defaults.items() if isinstance(value, (bool, int, float, tuple))}
    return {"class": type(optimizer).__qualname__} | {name: str(value) for name, value in plain.items()}
