"""What hyperparameters of the user's own do, on inputs and on activations.

Emitted code names the user's function by a string, ``module:name``, which is looked up when it runs: among the
functions that were compiled in this process, else by importing it.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from stn_fx.augment.draws import Draws, ReplayDraws
from stn_fx.errors import InputError
from stn_fx.rules.layout import align
from stn_fx.rules.markers import CUSTOM, marks
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.tangent import linearize

_FUNCTIONS: dict[str, Callable[..., Any]] = {}


@marks(CUSTOM)
def custom_site(x: Tensor, function: str, per_batch: bool = False) -> Tensor:
    """Marks a value that the user's function, by its reference, acts on; with one value for the batch, or for each."""
    return x


def reference(function: Callable[..., Any]) -> str:
    """Text that names a function from now on; one that cannot be imported has a number, good in this process."""
    name = getattr(function, "__qualname__", type(function).__name__)
    text = f"{getattr(function, '__module__', '')}:{name}"
    try:
        importable = _imported(text) is function
    except InputError:
        importable = False
    text = text if importable else f"{text}#{id(function)}"
    _FUNCTIONS[text] = function
    return text


def apply_custom(function: str, x: Tensor, value: Tensor, layout: Any, draws: Draws, name: str) -> Tensor:
    """The user's function on ``x`` with one value per example, (B,); its result must be like ``x``.

    Without a layout the function has one value for the whole batch, the same in all rows.
    """
    value = value.to(x.dtype)
    result = _function(function)(x, value[0] if layout is None else align(value, layout, x.ndim), draws)
    if not isinstance(result, Tensor) or result.shape != x.shape or result.dtype != x.dtype:
        got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
        raise InputError(f"{function} must return a tensor like its input ({x.dtype} {tuple(x.shape)}), not {got}.")
    return result


def custom_tangent(
    function: str, x: Tensor, tangent: Tensor, value: Tensor, layout: Any, draws: Draws, name: str
) -> Tensor:
    """Tangent of :func:`apply_custom` in ``x``, with the numbers that ``draws`` has handed out there."""
    return linearize(lambda primal: apply_custom(function, primal, value, layout, draws, name), (x,), (tangent,))


def replaying(draws: Draws) -> ReplayDraws:
    """Draws for one site, which hand the same numbers to primal and tangent."""
    return ReplayDraws(draws.generator)


def _function(text: str) -> Callable[..., Any]:
    if text not in _FUNCTIONS:
        _FUNCTIONS[text] = _imported(text)
    return _FUNCTIONS[text]


def _imported(text: str) -> Any:
    module, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{text} cannot be imported: {error}. Define the function at the top of a module.") from error
    return found


@REGISTRY.register
class CustomRule(Rule):
    """A hyperparameter of the user's own."""

    name = CUSTOM
    targets = (custom_site,)

    def is_site(self, node: Node) -> bool:
        """Inserted by the plan, so always a site."""
        return True

    def own_rate(self, node: Node) -> float:
        """There is no rate of the author's."""
        return 0.0

    def _apply(self, emit: Emitter, node: Node, draws: Node) -> tuple[Node, tuple[Any, ...]]:
        layout = None if len(node.args) > 2 and node.args[2] else emit.layout(node)
        options = (emit.rate(node), layout, draws, emit.site_name(node))
        return emit.call(apply_custom, node.args[1], emit.value(node.args[0]), *options), options

    def base(self, emit: Emitter, node: Node) -> Any:
        return self._apply(emit, node, emit.draws)[0]

    def respond(self, emit: Emitter, node: Node) -> Any:
        return emit.value(node.args[0])

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, tangent = emit.value(node.args[0]), emit.tangent(node.args[0])
        if tangent is None:
            return self.base(emit, node), None
        primal, options = self._apply(emit, node, emit.call(replaying, emit.draws))
        return primal, emit.call(custom_tangent, node.args[1], x, tangent, *options)
