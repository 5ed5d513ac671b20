"""The judge: the user's own module, run with given weights, for one or several examples.

Where a response lives on an effective tensor (weight norm, standardised convolution), no parameter can be overridden;
the captured graph is run instead, with that tensor's value changed.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx.node import map_arg
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from stn_fx.compiler.forward_mode import is_foreign
from stn_fx.compiler.layouts import run_node
from stn_fx.compiler.pipeline import state_tensors
from stn_fx.compiler.stand_ins import AllLayersRun
from stn_fx.rules.drop_path import marked_forward
from stn_fx.rules.slots import slots
from stn_fx.rules.tangent import load_forward_mode
from stn_fx.verify.subject import Inputs, same_draws, unshared

if TYPE_CHECKING:
    from stn_fx.transform import SelfTuningModule

Changes = dict[str, Tensor]


class Judge:
    """Outputs and directional derivatives of the user's model under changes of its weights.

    ``training``: the training pass with nothing dropped and batch statistics, else the evaluation pass.
    """

    def __init__(self, stn: "SelfTuningModule", training: bool) -> None:
        self.model, self.training = stn.model, training
        compiled = stn.compiled
        self.effective = {plan.name for plan in compiled.plan.parameters if plan.is_effective}
        self.captured = compiled.captured
        self.graph = self.captured.training if training else self.captured.evaluation
        where = compiled.plan.effective.get("training" if training else "evaluation", {})
        self.nodes = {node: name for node, name in where.items() if name in self.effective}
        augmented = [n for n in self.graph.graph.nodes if n.target is torch.ops.stn_fx.own_augmentation.default]
        self.augmentations = [self.model.get_submodule(str(node.args[1])) for node in augmented]
        # Forward mode would give a silent zero for them.
        self.differences = any(is_foreign(node) for node in self.graph.graph.nodes) or any(
            not leaf.forward_mode for leaf in self.captured.opaque
        )

    def outputs(self, inputs: Inputs, changes: Changes) -> list[Tensor]:
        """Floating outputs at the weights ``w0 + changes``."""
        with self._conditions():
            return self._run(inputs, changes)

    def derivative(self, inputs: Inputs, changes: Changes) -> tuple[list[Tensor], bool]:
        """``J_w f . changes``, by forward mode; by central differences (True) where an operator has no forward mode."""
        load_forward_mode()
        with self._conditions():
            if not self.differences:
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    zeros = {name: torch.zeros_like(change) for name, change in changes.items()}
                    tangents = torch.func.jvp(lambda moved: self._run(inputs, moved), (zeros,), (changes,))[1]
                    return list(tangents), False
            step = 1e-5
            ends = [self._run(inputs, {n: s * step * c for n, c in changes.items()}) for s in (1, -1)]
            return [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)], True

    def _run(self, inputs: Inputs, changes: Changes) -> list[Tensor]:
        args, kwargs = unshared(inputs)
        same_draws()
        if self.effective & changes.keys():
            return floating(self._run_graph((args, kwargs), changes))
        owner = {id(p): name for name, p in self.model.named_parameters()}
        weights = {
            alias: p.detach() + changes[owner[id(p)]] for alias, p in slots(self.model) if owner.get(id(p)) in changes
        }
        return floating(torch.func.functional_call(self.model, weights, args, kwargs, tie_weights=False))

    def _run_graph(self, inputs: Inputs, changes: Changes) -> Any:
        state = {name: t.detach() for name, t in state_tensors(self.model, self.captured).items()}
        state.update({name: state[name] + change for name, change in changes.items() if name not in self.effective})
        values = dict(zip(self.graph.inputs, pytree.tree_leaves(inputs), strict=True))
        env: dict[Any, Any] = {}
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return map_arg(node.args[0], lambda n: env[n])
            if node.op == "placeholder":
                env[node] = values[node.name] if node.name in values else state[self.graph.state[node.name]]
                continue
            env[node] = run_node(node, env, fixed_statistics=False)
            name = self.nodes.get(node.name)
            if name in changes:
                env[node] = env[node] + changes[name]
        return None

    @contextmanager
    def _conditions(self) -> Iterator[None]:
        modes = [module.training for module in self.model.modules()]
        fast_path = torch.backends.mha.get_fastpath_enabled()
        if not self.training:
            self.model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                torch.no_grad(),
                sdpa_kernel(SDPBackend.MATH),
                nothing_dropped(self.model, self.augmentations),
                batch_statistics(self.model),
            ):
                yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for module, mode in zip(self.model.modules(), modes, strict=True):
                module.training = mode


def floating(output: Any) -> list[Tensor]:
    """The floating tensors of a nested output."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


@contextmanager
def nothing_dropped(model: nn.Module, augmentations: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Every dropout is the identity, however the model calls it, and so are these augmentations."""
    found = {m for m in model.modules() if marked_forward(m) is not None} | set(augmentations)
    patched = [m for m in found if "forward" not in vars(m)]
    for module in patched:
        module.__dict__["forward"] = lambda x: x
    try:
        with _NoDropout(), AllLayersRun():
            yield
    finally:
        for module in patched:
            del module.__dict__["forward"]


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Norms in training mode use batch statistics without touching the running ones: forward mode cannot write them."""
    kept = []
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.training and module.track_running_stats:
            kept.append((module, module.running_mean, module.running_var))
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    try:
        yield
    finally:
        for module, mean, variance in kept:
            module.track_running_stats, module.running_mean, module.running_var = True, mean, variance


_DROPOUTS = {
    getattr(place, name)
    for place in (torch, torch.nn.functional)
    for name in (
        "dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout",
        "feature_alpha_dropout", "feature_dropout_", "alpha_dropout_", "feature_alpha_dropout_",
    )
    if hasattr(place, name)
}  # fmt: skip


_RATES = {
    torch.nn.functional.scaled_dot_product_attention: (4, "dropout_p"),
    torch.nn.functional.multi_head_attention_forward: (10, "dropout_p"),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), (5, "dropout")),
}
"""Functions that drop inside: position and name of the rate."""


class _NoDropout(TorchFunctionMode):
    """Replaces every dropout function by the identity, and the rate inside attention and recurrent networks by zero."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func in _RATES:
            position, name = _RATES[func]
            if len(args) > position:
                args = (*args[:position], 0.0, *args[position + 1 :])
            else:
                kwargs[name] = 0.0
        return func(*args, **kwargs)
