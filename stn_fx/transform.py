"""The facade: ``transform`` compiles a module into a ``SelfTuningModule``."""

import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from stn_fx.arguments import require_count
from stn_fx.augment.draws import Draws
from stn_fx.augment.image_format import ImageFormat
from stn_fx.compiler.capture import CapturedGraph
from stn_fx.compiler.casts import ambient_autocast, without_autocast
from stn_fx.compiler.finalize import Finalized, write_rates
from stn_fx.compiler.pipeline import BatchAxis, CompiledModel, compile_model, constants_fit, state_tensors
from stn_fx.compiler.report import Report
from stn_fx.compiler.responses import build_responses, part_shapes, planned_shapes
from stn_fx.compiler.signature import changed_settings, input_signature, module_signature, training_flags
from stn_fx.errors import InputError, StnError
from stn_fx.hparams import HyperparameterSpace, Selection, parse_hparams
from stn_fx.hparams.selection import Chosen
from stn_fx.rules import Registry, load_builtin_rules
from stn_fx.rules.as_found import left_as_found
from stn_fx.rules.rule import Groups
from stn_fx.rules.structure import LowRank, Response, RowWise, square_norm
from stn_fx.rules.tangent import differentiable

KEPT_CAPTURES = 8
"""Captures kept for shapes, modes and settings that come back; bounded, as some models never stop changing theirs."""

ResponseForm = str | RowWise | LowRank | None
HparamsArgument = str | Iterable[str | Chosen] | Chosen | None


def transform(
    model: nn.Module,
    hparams: HparamsArgument = None,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    *,
    batch_axis: BatchAxis = None,
    response: ResponseForm = "rowwise",
    rules: Registry | None = None,
    seed: int | None = None,
    image_format: ImageFormat | None = None,
) -> "SelfTuningModule":
    """Compile ``model`` into a module that tunes its own hyperparameters.

    Args:
        model: any module; it is wrapped, trained in place, and never changed otherwise.
        hparams: a comma-separated string, a list of names, ``Hyperparameter`` and ``CustomHyperparameter`` objects, or
            None for every dropout and drop-path site that the model has and weight decay.
        example_inputs: tuple of positional or dict of keyword inputs, one batch; None = the first batch that is seen.
        batch_axis: where the batch lies in the inputs: an int, or one per input (flattened). None = the first of axes 0
            and 1 along which the examples are independent; a model that is independent along both (a linear layer over
            a sequence) is taken as batch-first, so a sequence-first one needs ``batch_axis=1``.
        response: "rowwise" (the papers'), ``RowWise(terms)``, ``LowRank(r)``, or None for a model that only trains, at
            hyperparameters that are given: with `FixedHyperparameters` or along a schedule.
        rules: operator rules; None = the built-in ones (``stn_fx.rules.load_builtin_rules().copy()`` to add to).
        seed: of the response's initial values and of all masks; None = torch's initial seed.
        image_format: the normalisation of image inputs, which brightness, contrast, saturation and hue need.

    Raises:
        CaptureError, BatchLayoutError, UnknownHyperparameterError, OutOfBoundsError, InputError: see ``stn_fx.errors``.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"transform needs a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, SelfTuningModule):
        raise InputError("This module is already a SelfTuningModule. Pass the user's own model.")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise InputError(
            f"The model is in a {type(model).__name__}. Pass the model itself (its .module): under torchrun gradients "
            f"are averaged over the processes in every update, without a wrapper."
        )
    if response is not None and response != "rowwise" and not isinstance(response, (LowRank, RowWise)):
        raise InputError(f"response={response!r} is neither 'rowwise' nor RowWise(terms), LowRank(r) or None.")
    if rules is not None and not isinstance(rules, Registry):
        raise InputError(f"rules is a {type(rules).__name__}; pass a registry: load_builtin_rules().copy(), added to.")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise InputError(f"seed={seed!r} must be a whole number or None.")
    stn = SelfTuningModule(model, hparams, batch_axis, response, rules, seed, image_format)
    if example_inputs is not None:
        stn.compile_for(example_inputs)
    return stn


class SelfTuningModule(nn.Module):
    """A model that runs with different hyperparameters for every example, and knows how its weights respond to them.

    ``stn(x)`` is a drop-in: in evaluation mode the user's module itself, in training mode the base pass.
    B examples, H hyperparameters; ``raw_BH`` are absolute raw values, measured from the detached current ones.
    """

    def __init__(
        self,
        model: nn.Module,
        hparams: HparamsArgument,
        batch_axis: BatchAxis,
        response: ResponseForm,
        rules: Registry | None,
        seed: int | None,
        image_format: ImageFormat | None = None,
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model = model
        self._selections = parse_hparams(hparams)
        self._batch_axis = batch_axis
        self._responds = response is not None
        self._structure = response if isinstance(response, (LowRank, RowWise)) else RowWise()
        self._rules = rules  # None = the built-in ones, which need not be pickled
        self._seed = torch.initial_seed() if seed is None else seed
        self._image_format = image_format
        self._generators: dict[str, torch.Generator] = {}
        self._captures: list[_Capture] = []
        self._live: set[int] = set()
        self._watched: list[Tensor] | None = None
        self._groups: Groups | None = None
        self._example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.response = nn.Module()
        self.finalized: Finalized | None = None

    # ---- compilation

    def compile_for(self, example_inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor) -> CompiledModel:
        """Compile for a batch like this one; response parameters and hyperparameters that exist are kept."""
        return self._compile(*_split_inputs(example_inputs))

    def _compile(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledModel:
        rules = load_builtin_rules() if self._rules is None else self._rules
        # Not every step that runs the model sees to it by itself: one that draws random numbers moved the generators.
        with left_as_found(self.model):
            compiled = compile_model(
                self.model, args, kwargs, self._selections, self._structure, self._batch_axis, rules,
                self._image_format, self._responds,
            )  # fmt: skip
        if self._example is not None:
            self._check_same_parameters(compiled)
        else:
            self._build_parameters(compiled)
        axes = compiled.captured.batch_axes
        self._live |= {id(module) for leaf in compiled.captured.opaque for module in leaf.module.modules()}
        signature = (input_signature(args, kwargs, axes), self._surroundings())
        self._captures.insert(0, _Capture(compiled, signature, compiled.captured.training_flags))
        if len(self._captures) > KEPT_CAPTURES:
            self._warn_of_captures()
            del self._captures[KEPT_CAPTURES:]
        self._example = tree_detached((args, kwargs))
        return compiled

    def _warn_of_captures(self) -> None:
        (inputs, (now, autocast)), (old_inputs, (before, old_autocast)) = (c.signature for c in self._captures[:2])
        places = changed_settings(self.model, before, now, self._live)
        if places:
            why = f"{', '.join(places[:4])} changed. Keep what changes from step to step in a tensor (a buffer)"
        elif inputs != old_inputs:
            why = "the inputs have another shape or structure. Use few shapes: pad to a multiple of some length"
        else:
            why = "autocast, hooks or modes of submodules changed" if autocast == old_autocast else "autocast changed"
        warnings.warn(
            f"{type(self.model).__name__} is captured anew for the {KEPT_CAPTURES + 1}th time or more, which takes "
            f"seconds each time: {why}.",
            stacklevel=2,
        )

    def _build_parameters(self, compiled: CompiledModel) -> None:
        reference = next(p for p in self.model.parameters() if p.is_floating_point())
        self.hparams = HyperparameterSpace(compiled.plan.hyperparameters, reference.dtype, reference.device)
        generator = torch.Generator().manual_seed(self._seed)
        self.response = nn.Module()
        for name, module in build_responses(compiled.plan, self.model, generator).items():
            self.response.add_module(name.replace(".", "/"), module)

    def _check_same_parameters(self, compiled: CompiledModel) -> None:
        """Another shape or mode may use other parts of the model; the response parameters must still fit."""
        names = tuple(each.name for each in compiled.plan.hyperparameters)
        shapes, mine = planned_shapes(compiled.plan), part_shapes(self.responses())
        if names != self.hparams.names or shapes != mine:
            different = set(names) ^ set(self.hparams.names)
            different |= {name for name in shapes | mine if shapes.get(name) != mine.get(name)}
            raise StnError(
                f"Captured anew for these inputs, the model asks for other hyperparameters or response parameters: "
                f"{', '.join(sorted(different)[:8])}. Use one wrapper for each way to call the model."
            )

    @property
    def compiled(self) -> CompiledModel:
        """Graphs, layouts and plan of the latest capture; an error before the first batch was seen."""
        self._require_capture()
        if not self._captures:  # copied or unpickled
            assert self._example is not None
            return self._compile(*self._example)
        return self._captures[0].compiled

    def _require_capture(self) -> None:
        if self._example is None:
            raise StnError(
                "The model is not captured yet, so it has no hyperparameters, response parameters or report. Pass "
                "example_inputs=(x,) to stn_fx.transform, or run one batch through it first."
            )

    def __getattr__(self, name: str) -> Any:
        if name == "hparams" and "hparams" not in self.__dict__.get("_modules", {}) and "_captures" in self.__dict__:
            self._require_capture()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Captured graphs and generators do not pickle: they are made again from the example and the states."""
        state = dict(self.__dict__)
        state["_captures"], state["_live"] = [], set()
        state["_generators"] = {device: g.get_state() for device, g in self._generators.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state.pop("_generators")
        super().__setstate__(state)
        self._generators = {}
        for device, generator_state in states.items():
            self.generator(device).set_state(generator_state)

    # ---- the three passes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Drop-in for the user's model: itself in evaluation mode, the base pass in training mode."""
        if not self.training:
            return self.model(*args, **kwargs)
        compiled, inputs = self._prepare(args, kwargs)
        batch = compiled.captured.batch_size(inputs)
        values = self.hparams.constrain(self.hparams.raw.detach().unsqueeze(0)).expand(batch, -1)
        with without_autocast(self.model):
            outputs = compiled.base(self._state(compiled), {}, values, None, self._draws(), *inputs)
        return self._handed_out(compiled.captured.training, outputs)

    def linearize(self, *args: Any, raw: Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
        """Linearized pass (Delta-STN, Bae & Grosse 2020, equation 9): ``(primal, tangent)``, trees like the output.

        The primal is ``f(x; w0)`` with the hyperparameters of ``raw`` (B, H) per example, on the graph of this module's
        mode and with the base parameters detached; the tangent is ``J_w f . DeltaW(raw - current)``.
        """
        passed = self.linearize_with_activations(*args, raw=raw, **kwargs)
        self._watch(p + t for p, t in zip(passed.activations, passed.activation_tangents, strict=True))
        return passed.primal, passed.tangent

    def linearize_with_activations(self, *args: Any, raw: Tensor | None = None, **kwargs: Any) -> "LinearizedPass":
        """The same with the activations that terms of the loss look at; `watching` does not see these."""
        compiled, inputs = self._prepare(args, kwargs)
        raw_BH, delta_BH = self._displacement(raw, compiled.captured.batch_size(inputs))
        graph = compiled.linearized_in_groups(self._groups) if self.training else compiled.linearized_evaluation
        captured = compiled.captured.training if self.training else compiled.captured.evaluation
        state = {name: tensor.detach() for name, tensor in self._state(compiled).items()}
        if self.training:
            self._require_one_per_batch(raw_BH)
        values = self.hparams.constrain(raw_BH.detach())
        with without_autocast(self.model):
            primals, tangents = graph(state, self._response(), values, delta_BH, self._draws(), *inputs)
        if any(isinstance(p, Tensor) and p.requires_grad for p in primals):
            raise StnError(
                "The primal of the linearized pass requires grad, so its tangent's gradient would be wrong. Detach the "
                "inputs that require grad."
            )
        return _linearized(captured, primals, tangents)

    def linearize_and_train(self, *args: Any, raw: Tensor, **kwargs: Any) -> "LinearizedPass":
        """The linearized pass on the training graph as the pass that trains the model: one forward for both updates.

        The primal is differentiable in the base parameters and running statistics follow it, else as `linearize`.
        Differentiate a loss of the primal by ``backward(inputs=base parameters)``, and one of ``primal.detach() +
        tangent`` by ``backward(inputs=response parameters)``: without ``inputs`` the tangent's gradient would reach the
        base parameters too, and not all of it.
        """
        compiled, inputs = self._prepare(args, kwargs)
        raw_BH, delta_BH = self._displacement(raw, compiled.captured.batch_size(inputs))
        self._require_one_per_batch(raw_BH)
        captured, values = compiled.captured.training, self.hparams.constrain(raw_BH.detach())
        with without_autocast(self.model):
            state, response = self._state(compiled), self._response()
            graph = compiled.linearized_in_groups(self._groups, updates_buffers=True)
            primals, tangents = graph(state, response, values, delta_BH, self._draws(), *inputs)
        return _linearized(captured, primals, tangents)

    def respond(self, *args: Any, raw: Tensor | None = None, **kwargs: Any) -> Any:
        """Response pass ``f(x; w0 + DeltaW(raw_i - current))`` for every example i, always on the evaluation graph.

        Differentiable in ``raw`` (B, H); None = the live raw Parameter for every example.
        """
        compiled, inputs = self._prepare(args, kwargs)
        return self._respond(compiled, compiled.response, inputs, raw)

    def respond_with_statistics(self, *args: Any, raw: Tensor | None = None, **kwargs: Any) -> Any:
        """The response pass as outer steps differentiate it: running statistics of batch norms follow the weights.

        The value is that of ``respond``. Its derivatives also go through the running statistics that training updates:
        other weights would have led to other statistics, which are taken to change as those of this batch do. With
        statistics that stay, the scale of each weight row before a batch norm, to which the trained model is
        indifferent, would move the output; the response learns nothing about it, so this is noise.
        """
        compiled, inputs = self._prepare(args, kwargs)
        return self._respond(compiled, compiled.response_with_statistics(self._groups), inputs, raw)

    def _respond(self, compiled: CompiledModel, graph: GraphModule, inputs: list[Any], raw: Tensor | None) -> Any:
        _, delta_BH = self._displacement(raw, compiled.captured.batch_size(inputs))
        with without_autocast(self.model):
            outputs = graph(self._state(compiled), self._response(), None, delta_BH, None, *inputs)
        return compiled.captured.evaluation.unflatten(outputs)

    def respond_in_training(
        self, *args: Any, raw: Tensor, base: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """Response pass on the training graph: ``f(x; w0 + DeltaW(raw_i - current))`` with dropout and augmentation.

        For variants that learn the response without linearization. The base parameters are detached and running
        statistics stay untouched; with ``base``, parameters by name to use instead, it is the pass that trains the
        model, and updates running statistics.
        """
        compiled, inputs = self._prepare(args, kwargs)
        raw_BH, delta_BH = self._displacement(raw, compiled.captured.batch_size(inputs))
        buffers = dict(self.model.named_buffers(remove_duplicate=False))
        state = self._state(compiled)
        if base is None:
            state = {name: t.clone() if name in buffers else t.detach() for name, t in state.items()}
        else:
            given = {id(p): base[name] for name, p in self.model.named_parameters() if name in base}
            tied = self.model.named_parameters(remove_duplicate=False)
            state |= {name: given[id(p)] for name, p in tied if id(p) in given} | dict(base)
        self._require_one_per_batch(raw_BH)
        values = self.hparams.constrain(raw_BH.detach())
        with without_autocast(self.model):
            outputs = compiled.response_training(state, self._response(), values, delta_BH, self._draws(), *inputs)
        return self._handed_out(compiled.captured.training, outputs)

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """The activations (B, ...) that terms of the loss look at, of every pass on the training graph inside.

        They come in the order of ``activation_terms(stn.compiled.plan.sites)``; of the linearized pass it is primal +
        tangent. What the passes return stays as it is.
        """
        before, self._watched = self._watched, []
        try:
            yield self._watched
        finally:
            self._watched = before

    def _watch(self, activations: Iterable[Tensor]) -> None:
        if self._watched is not None:
            self._watched.extend(activations)

    def _handed_out(self, captured: CapturedGraph, outputs: list[Any]) -> Any:
        """What the model returns; the rest of a pass's outputs are activations that terms of the loss look at."""
        count = captured.output_spec.num_leaves
        self._watch(outputs[count:])
        return captured.unflatten(outputs[:count])

    def _displacement(self, raw: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        raw_BH = self.hparams.raw.unsqueeze(0).expand(batch, -1) if raw is None else raw
        self._require_like_raw("raw", raw_BH)
        if raw_BH.ndim == 1:
            raw_BH = raw_BH.unsqueeze(0).expand(batch, -1)
        if raw_BH.shape != (batch, len(self.hparams)):
            raise InputError(
                f"raw has shape {tuple(raw_BH.shape)}, not ({batch}, {len(self.hparams)}): one row per "
                f"example, one column per hyperparameter ({', '.join(self.hparams.names)})."
            )
        # Without the detach the displacement is identically zero, and with it the hypergradient.
        return raw_BH, raw_BH - self.hparams.raw.detach()

    def _require_one_per_batch(self, raw_BH: Tensor) -> None:
        """What acts on a whole batch can only have one value there."""
        for column in self.hparams.per_batch:
            if not bool((raw_BH[:, column] == raw_BH[0, column]).all()):
                raise InputError(
                    f"{self.hparams.names[column]} has one value for all examples of a batch (per_batch=True), and raw "
                    f"has several. Give its column the same number in every row."
                )

    def _require_like_raw(self, name: str, value: Any) -> None:
        mine = self.hparams.raw
        if not isinstance(value, Tensor) or (value.dtype, value.device) != (mine.dtype, mine.device):
            given = f"{value.dtype} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{name} must be a tensor of {mine.dtype} on {mine.device} like hparams.raw, not {given}.")

    # ---- parameters

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """The user's own parameters that are trained."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def response_parameters(self) -> Iterator[nn.Parameter]:
        """What describes how the weights respond."""
        self._require_capture()
        return self.response.parameters()

    def responses(self) -> dict[str, Response]:
        """Response structures by the qualified name of the parameter or effective weight."""
        self._require_capture()
        return {name.replace("/", "."): module for name, module in self.response.named_children()}  # type: ignore[misc]

    def weight_response(self, delta: Tensor) -> dict[str, Tensor]:
        """``{qualified name: DeltaW}`` for one displacement (H,), dense."""
        self._require_capture()
        self._require_like_raw("delta", delta)
        if delta.shape != self.hparams.raw.shape:
            raise InputError(
                f"delta has shape {tuple(delta.shape)}, not ({len(self.hparams)},): one number per hyperparameter "
                f"({', '.join(self.hparams.names)})."
            )
        return {name: response.dense(delta) for name, response in self.responses().items()}

    def squared_norm(self, raw: Tensor | None = None, names: Iterable[str] | None = None) -> Tensor:
        """``|w|^2`` over weights, for weight decay.

        Without ``raw`` a scalar, live in the base parameters; with raw (B, H) the norms (B,) of ``w0 + DeltaW_i``,
        base detached, from the structure alone. ``names`` are parameters; None = those with two or more axes.
        """
        weights = self.penalized(names)
        if raw is None:
            return _total([square_norm(w) for w in weights.values()], self.hparams.raw)
        delta_BH = raw - self.hparams.raw.detach()
        total = _total([square_norm(w.detach()) for w in weights.values()], raw).expand(raw.shape[0])
        for name, response in self.responses_of_parameters(weights):
            total = total + response.squared_norm_change(weights[name].detach(), delta_BH)
        return total

    def absolute_norm(self, raw: Tensor | None = None, names: Iterable[str] | None = None) -> Tensor:
        """``|w|_1``, as ``squared_norm``; with ``raw`` to first order, ``|w0|_1 + <sign(w0), DeltaW_i>``.

        That is exact for weights whose sign the perturbation does not change, and keeps it a sum over the structure.
        """
        weights = self.penalized(names)
        if raw is None:
            return _total([w.abs().sum() for w in weights.values()], self.hparams.raw)
        delta_BH = raw - self.hparams.raw.detach()
        total = _total([w.detach().abs().sum() for w in weights.values()], raw).expand(raw.shape[0])
        for name, response in self.responses_of_parameters(weights):
            total = total + response.inner_product(weights[name].detach().sign(), delta_BH)
        return total

    def responses_of_parameters(self, names: Container[str]) -> Iterator[tuple[str, Response]]:
        """The responses of these parameters, without those of effective weights.

        An effective weight may bear its parameter's name, but its response is no change of that parameter.
        """
        effective = {plan.name for plan in self.compiled.plan.parameters if plan.is_effective}
        return ((n, each) for n, each in self.responses().items() if n in names and n not in effective)

    def penalized(self, names: Iterable[str] | None = None) -> dict[str, nn.Parameter]:
        """The trained parameters of these names; None = those with two or more axes, as the norms take them."""
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        return {n: p for n, p in trained.items() if p.ndim >= 2} if names is None else {n: trained[n] for n in names}

    @property
    def selections(self) -> list[Selection]:
        """What was asked to be tuned, entry by entry."""
        return self._selections

    @property
    def report(self) -> Report:
        """What was conditioned, by which rule, what was not and why."""
        return Report.of(self.compiled, self)

    def finalize(self) -> nn.Module:
        """Write the tuned rates into the model's own modules where they have a place; return the plain model.

        What was written and what has no place in the model (inserted sites, cutout, terms of the loss) is then in
        ``stn.finalized``.
        """
        self.finalized = write_rates(self.model, self.compiled.plan, self.hparams.values())
        return self.model

    # ---- randomness and plumbing

    def generator(self, device: torch.device | str | None = None) -> torch.Generator:
        """The generator that masks and perturbations are drawn from, one per device."""
        where = torch.device(device) if device is not None else next(self.model.parameters()).device
        if str(where) not in self._generators:
            self._generators[str(where)] = torch.Generator(where).manual_seed(self._seed)
        return self._generators[str(where)]

    @contextmanager
    def in_groups(self, size: int | None, before: int = 0) -> Iterator[None]:
        """Inside, ``size`` consecutive examples share their ``raw``; linearized passes in training, and
        ``respond_with_statistics``, are told.

        A batch norm then changes its statistics for a group as if the whole batch were perturbed like it. Without
        this, perturbations that differ cancel in the statistics, and an example seems free to scale weight rows before
        a batch norm, which training is indifferent to.

        Args:
            size: of a group; None = nothing is told.
            before: examples of the first group that another process has.
        """
        if size is not None:
            require_count("size", size)
        outer, self._groups = self._groups, None if size is None else Groups(size, before % size)
        try:
            yield
        finally:
            self._groups = outer

    @contextmanager
    def drawing_from(self, generators: dict[str, torch.Generator]) -> Iterator[None]:
        """Draw masks from these generators, by device, instead of the module's own."""
        own, self._generators = self._generators, generators
        try:
            yield
        finally:
            self._generators = own

    def _draws(self) -> Draws:
        return Draws(self.generator())

    def _state(self, compiled: CompiledModel) -> dict[str, Tensor]:
        return state_tensors(self.model, compiled.captured)

    def _response(self) -> dict[str, Tensor]:
        if not self._responds:
            raise StnError(
                "The model was wrapped with response=None: it trains at given hyperparameters, and has neither a "
                "linearized nor a response pass. Use FixedHyperparameters, or transform the model with a response."
            )
        return {
            f"{name}.{part}": parameter
            for name, module in self.responses().items()
            for part, parameter in module.named_parameters()
        }

    def _surroundings(self) -> Any:
        """What else than the inputs a capture holds for."""
        return module_signature(self.model, self._live), ambient_autocast(self.model)

    def _prepare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CompiledModel, list[Any]]:
        """The compiled model that fits these inputs, captured anew where none does, and the flattened inputs."""
        flat, _ = pytree.tree_flatten((args, kwargs))
        surroundings = self._surroundings()
        flags = training_flags(self.model) if self.training else None
        for index, capture in enumerate(self._captures):
            fits = capture.signature == (input_signature(args, kwargs, capture.batch_axes), surroundings)
            fits = fits and constants_fit(self.model, capture.compiled.captured)
            if fits and flags in (None, capture.training_flags):
                if index:
                    self._captures.insert(0, self._captures.pop(index))
                return capture.compiled, flat
        compiled = self._compile(args, kwargs)  # registers dataclasses, so that they are flattened from now on
        return compiled, pytree.tree_leaves((args, kwargs))


class LinearizedPass(NamedTuple):
    """Trees like the model's output, and the activations (B, ...) that terms of the loss look at, in their order."""

    primal: Any
    tangent: Any
    activations: list[Tensor]
    activation_tangents: list[Tensor]


@dataclass(frozen=True)
class _Capture:
    """One compiled form of the model, and what it holds for."""

    compiled: CompiledModel
    signature: Any
    training_flags: Any

    @property
    def batch_axes(self) -> list[int | None]:
        return self.compiled.captured.batch_axes


def tree_detached(tree: Any) -> Any:
    """The tree with its tensors detached, so that an example keeps no graph alive."""
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def _linearized(captured: CapturedGraph, primals: list[Any], tangents: list[Any]) -> LinearizedPass:
    tangents = [_full_tangent(p, t) for p, t in zip(primals, tangents, strict=True)]
    count = captured.output_spec.num_leaves
    trees = (captured.unflatten(primals[:count]), captured.unflatten(tangents[:count]))
    return LinearizedPass(*trees, primals[count:], tangents[count:])


def _full_tangent(primal: Any, tangent: Any) -> Any:
    if not differentiable(primal):
        return tangent
    return torch.zeros_like(primal) if tangent is None else tangent


def _total(norms: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(norms).sum() if norms else like.new_zeros(())


def _split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}; pass a tuple of positional inputs, or a dict of keyword "
        f"inputs."
    )
