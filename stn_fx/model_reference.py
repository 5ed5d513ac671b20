"""From what a user types to a model: `path/to/file.py`, `file.py:name`, `torchvision:NAME`, `timm:NAME`."""

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from stn_fx.errors import InputError

FACTORY_NAMES = ("model", "build_model", "create_model", "get_model", "make_model")
CHANNEL_ARGUMENTS = ("in_chans", "in_channels", "num_channels", "channels")
FORMS = "a file (model.py), a name in a file (model.py:Net), torchvision:NAME, or timm:NAME"


@dataclass(frozen=True)
class LoadedModel:
    """A model with its origin.

    Attributes:
        model: the module, in training mode.
        name: short name for files and titles.
        namespace: the file's module, which may declare more (such as example inputs); None for a library's model.
    """

    model: nn.Module
    name: str
    namespace: ModuleType | None = None


def path_of(reference: str) -> tuple[str, str, str]:
    """(path, separator, name) of a model in a file; an empty path where the reference names none."""
    if reference.partition(":")[0] in ("torchvision", "timm"):
        return "", "", ""
    # A path may hold colons of its own (drive letters), a name cannot hold dots.
    found = reference.rpartition(":") if not reference.endswith(".py") else (reference, "", "")
    return found if found[0].endswith(".py") else ("", "", "")


def load_model(
    reference: str,
    classes: int | None = None,
    channels: int | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Build the model that a reference names.

    Args:
        reference: see above.
        classes: number of outputs, for factories with an argument `num_classes`.
        channels: number of input channels, for factories with an argument such as `in_chans`.
        arguments: further keyword arguments of the factory, which win.

    Raises:
        InputError: the reference has none of the forms, names nothing, or building the model fails.
    """
    wanted = {"num_classes": classes, **dict.fromkeys(CHANNEL_ARGUMENTS, channels)}
    given = dict(arguments or {})
    head, separator, tail = reference.partition(":")
    if separator and head == "torchvision":
        model = _torchvision(tail, _known(wanted, "num_classes") | given)
        return LoadedModel(model.train(), tail)
    if separator and head == "timm":
        model = _timm(tail, _known(wanted, "num_classes", "in_chans") | given)
        return LoadedModel(model.train(), tail)
    path, _, name = path_of(reference)
    if not path:
        raise InputError(f"{reference!r} names no model. Give {FORMS}.")
    namespace = _execute(Path(path).expanduser())
    return LoadedModel(_from_file(namespace, path, name, wanted, given).train(), name or Path(path).stem, namespace)


def input_channels(model: nn.Module) -> int | None:
    """Channels that the first convolution takes; None where there is none."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((module.in_channels for module in model.modules() if isinstance(module, kinds)), None)


def _known(wanted: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: wanted[name] for name in names if wanted[name] is not None}


def _torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise InputError(f"torchvision has no model {name!r}.{_similar(name, models.list_models())}")
    return _build(f"torchvision:{name}", lambda **kwargs: models.get_model(name, weights=None, **kwargs), arguments)


def _timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise InputError("timm is not installed. Run: pip install 'stn-fx[examples]'") from error
    if not timm.is_model(name):
        raise InputError(f"timm has no model {name!r}.{_similar(name, timm.list_models())}")
    return _build(f"timm:{name}", lambda **kwargs: timm.create_model(name, **kwargs), arguments)


def _similar(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=5, cutoff=0.6)
    return f" Similar names: {', '.join(close)}." if close else " Its own list of models tells the names."


def _build(reference: str, factory: Callable[..., Any], arguments: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**arguments)
    except Exception as error:  # whatever a factory raises about the arguments that it was given
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "no arguments"
        raise InputError(
            f"{reference} cannot be built with {shown}: {type(error).__name__}: {error}. Change them with --model-arg."
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{reference} gave a {type(model).__name__}, not a torch.nn.Module.")
    return model


def _execute(path: Path) -> ModuleType:
    """Run a file as a module, with its folder on the path for imports of its neighbours."""
    if not path.is_file():
        raise InputError(f"There is no file {path}. Give {FORMS}.")
    name = f"stn_fx_model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "the suffix is .py"
    assert spec.loader is not None, "the suffix is .py"
    namespace = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look the module up by its name.
    sys.modules[name] = namespace
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        spec.loader.exec_module(namespace)
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" line {lines[-1]}:" if lines else ""
        raise InputError(f"{path} cannot be imported:{where} {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return namespace


def _from_file(
    namespace: ModuleType, path: str, name: str, wanted: Mapping[str, Any], given: dict[str, Any]
) -> nn.Module:
    if name and not hasattr(namespace, name):
        candidates = ", ".join(_candidates(namespace)) or "none"
        raise InputError(f"{path} has no {name!r}. Models and factories in it: {candidates}.")
    name = name or _only_candidate(namespace, path)
    target = getattr(namespace, name)
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise InputError(f"{path}:{name} is a {type(target).__name__}, neither a model nor a factory of one.")
    accepted = inspect.signature(target).parameters
    return _build(f"{path}:{name}", target, _known(wanted, *(set(wanted) & set(accepted))) | given)


def _candidates(namespace: ModuleType) -> dict[str, Any]:
    """Public models, module classes and functions that the file itself defines."""
    found = {}
    for name, value in vars(namespace).items():
        own = getattr(value, "__module__", None) == namespace.__name__
        is_class = inspect.isclass(value) and issubclass(value, nn.Module)
        if not name.startswith("_") and (
            isinstance(value, nn.Module) or (own and (is_class or inspect.isfunction(value)))
        ):
            found[name] = value
    return found


def _only_candidate(namespace: ModuleType, path: str) -> str:
    """An instance, else a factory by its usual name, else the only function or class; more than one is an error."""
    candidates = _candidates(namespace)
    instances = [name for name, value in candidates.items() if isinstance(value, nn.Module)]
    factories = [name for name in candidates if name in FACTORY_NAMES]
    classes = [name for name, value in candidates.items() if inspect.isclass(value)]
    for names in (instances, factories, classes, list(candidates)):
        if len(names) == 1:
            return names[0]
        if names:
            break
    if not candidates:
        raise InputError(f"{path} defines no model: neither an instance, a factory nor a class of torch.nn.Module.")
    choices = ", ".join(f"{path}:{name}" for name in candidates)
    raise InputError(f"{path} defines several models; say which: {choices}.")
