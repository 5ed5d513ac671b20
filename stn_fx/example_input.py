"""An example batch for a model: as given, as declared in its file, or deduced from its configuration or first layer.

What is deduced is tried: the model runs once on it in evaluation mode, so a shape that does not fit is never returned.
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stn_fx.errors import InputError

EXAMPLES = 2
TOKENS = 16
STEPS = 8
IMAGE_SIDES = (32, 28, 64, 96, 128, 224, 256, 299, 384, 512)
"""Sides tried in turn where only the number of channels is known: the smallest that the model takes, from 32 on."""

DECLARED = "example_inputs"
_RECURRENT = (nn.RNN, nn.LSTM, nn.GRU)

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class ExampleInput:
    """One batch, and where it comes from in words."""

    inputs: Inputs
    description: str


def example_input(
    model: nn.Module,
    shape: tuple[int, ...] | None = None,
    declared: Mapping[str, Any] | None = None,
    batch_axis: int = 0,
) -> ExampleInput:
    """An example batch for ``model``.

    Args:
        model: any module; its modes and its buffers are as before afterwards.
        shape: shape of one example, without the batch axis; None = deduce.
        declared: names of the model's file; ``example_inputs`` there is used where no shape is given.
        batch_axis: where the batch axis goes in tensors of ``shape``.

    Raises:
        InputError: nothing could be deduced, or what was given or declared does not fit the model.
    """
    if shape is not None:
        sizes = [*shape[:batch_axis], EXAMPLES, *shape[batch_axis:]]
        inputs: Inputs = (_like(model, torch.randn(sizes)),)
        _require_fit(model, inputs, f"an input of shape {_shown(sizes)}")
        return ExampleInput(inputs, f"{_shown(sizes)} as given")
    if declared and DECLARED in declared:
        return _declared(model, declared[DECLARED])
    for candidate, source in _candidates(model):
        if _failure(model, candidate) is None:
            return ExampleInput(
                candidate, f"{_described(candidate)} deduced from {source}; --input-shape gives another"
            )
    raise InputError(
        f"The input of {type(model).__name__} cannot be deduced from its configuration or its first layer. Give the "
        f"shape of one example, as --input-shape 3,32,32 (without the batch), or declare {DECLARED} in the model's "
        f"file: a tuple of tensors, a dict of keyword inputs, or a function that returns one."
    )


def _declared(model: nn.Module, value: Any) -> ExampleInput:
    value = value() if callable(value) and not isinstance(value, Tensor) else value
    inputs: Inputs = (value,) if isinstance(value, Tensor) else tuple(value) if isinstance(value, list) else value
    if not isinstance(inputs, (tuple, dict)):
        raise InputError(
            f"{DECLARED} is a {type(value).__name__}. Declare a tuple of tensors or a dict of keyword inputs."
        )
    _require_fit(model, inputs, f"the declared {DECLARED}")
    return ExampleInput(inputs, f"{_described(inputs)} as declared in the model's file")


def _candidates(model: nn.Module) -> Iterator[tuple[Inputs, str]]:
    """Batches that may fit, the best evidence first."""
    yield from _from_library_config(model)
    yield from _from_transformers_config(model)
    layers = [m for m in model.modules() if not list(m.children()) and any(True for _ in m.parameters(recurse=False))]
    layers += [m for m in model.modules() if isinstance(m, (*_RECURRENT, nn.MultiheadAttention))]
    convolution = next((m for m in layers if isinstance(m, nn.Conv2d)), None)
    channels = convolution.in_channels if convolution is not None else 3
    for name in ("image_size", "img_size", "input_size"):
        side = getattr(model, name, None)
        sides = (side, side) if isinstance(side, int) and not isinstance(side, bool) else side
        if isinstance(sides, (tuple, list)) and len(sides) == 2:
            yield _batch(model, channels, *sides), f"its attribute {name}"
    for layer in layers:
        yield from _from_layer(model, layer)


def _from_library_config(model: nn.Module) -> Iterator[tuple[Inputs, str]]:
    """timm: the sizes that its patch embedding was built for, else those of the pretrained weights."""
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        sizes = config.get("input_size") if isinstance(config, Mapping) else None
        if isinstance(sizes, (tuple, list)) and len(sizes) == 3:
            channels = _first_channels(model) or sizes[0]
            if isinstance(patches, (tuple, list)) and len(patches) == 2:
                yield _batch(model, channels, *patches), "its patch embedding"
            yield _batch(model, channels, *sizes[1:]), f"its {name}"


def _from_transformers_config(model: nn.Module) -> Iterator[tuple[Inputs, str]]:
    config = getattr(model, "config", None)
    if config is None:
        return
    parameters = inspect.signature(model.forward).parameters
    side, words = getattr(config, "image_size", None), getattr(config, "vocab_size", None)
    if isinstance(side, int) and "pixel_values" in parameters:
        (pixels,) = _batch(model, getattr(config, "num_channels", 3), side, side)
        yield {"pixel_values": pixels}, "its configuration (image_size)"
    if isinstance(words, int) and "input_ids" in parameters:
        inputs: dict[str, Any] = {"input_ids": _tokens(model, words, EXAMPLES, TOKENS)}
        if getattr(config, "use_cache", False) and "use_cache" in parameters:
            inputs["use_cache"] = False  # torch.export cannot capture the cache object
        yield inputs, "its configuration (vocab_size)"


def _from_layer(model: nn.Module, layer: nn.Module) -> Iterator[tuple[Inputs, str]]:
    kind = type(layer).__name__
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axes, channels = len(layer.kernel_size), layer.in_channels
        for side in IMAGE_SIDES:
            yield _batch(model, channels, *(side,) * axes), f"its first {kind} ({channels} channels, side tried)"
    elif isinstance(layer, nn.Linear):
        yield _batch(model, layer.in_features), f"a {kind} with {layer.in_features} inputs"
        yield _batch(model, STEPS, layer.in_features), f"a {kind} with {layer.in_features} inputs"
    elif isinstance(layer, nn.Embedding):
        yield (_tokens(model, layer.num_embeddings, EXAMPLES, TOKENS),), f"an {kind} of {layer.num_embeddings} tokens"
    elif isinstance(layer, _RECURRENT):
        yield _batch(model, STEPS, layer.input_size), f"a {kind} with {layer.input_size} inputs"
    elif isinstance(layer, nn.MultiheadAttention):
        yield _batch(model, STEPS, layer.embed_dim), f"a {kind} of width {layer.embed_dim}"


def _first_channels(model: nn.Module) -> int | None:
    return next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), None)


def _batch(model: nn.Module, *sizes: int) -> tuple[Tensor]:
    return (_like(model, torch.randn(EXAMPLES, *sizes)),)


def _tokens(model: nn.Module, words: int, *sizes: int) -> Tensor:
    return torch.randint(0, words, sizes).to(next(model.parameters()).device)


def _like(model: nn.Module, value: Tensor) -> Tensor:
    """On the device and in the dtype of the model's parameters."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    return value if parameter is None else value.to(parameter)


def _require_fit(model: nn.Module, inputs: Inputs, what: str) -> None:
    failure = _failure(model, inputs)
    if failure is not None:
        text = str(failure).splitlines()[0] if str(failure) else "no message"
        raise InputError(
            f"{type(model).__name__} does not run on {what}: {type(failure).__name__}: {text}. Give another shape with "
            f"--input-shape (of one example, without the batch)."
        ) from failure


def _failure(model: nn.Module, inputs: Inputs) -> Exception | None:
    """What running the model in evaluation mode raises; None where it runs."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    except Exception as error:  # a model may raise anything on inputs that do not fit
        return error
    finally:
        for module, training in modes.items():
            module.training = training
    return None


def _described(inputs: Inputs) -> str:
    values = inputs.items() if isinstance(inputs, dict) else enumerate(inputs)
    parts = []
    for name, value in values:
        text = f"{_shown(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)
        parts.append(f"{name}={text}" if isinstance(name, str) else text)
    return ", ".join(parts).replace("torch.", "")


def _shown(sizes: Any) -> str:
    return "x".join(str(size) for size in sizes)
