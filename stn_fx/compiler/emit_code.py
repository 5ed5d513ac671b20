"""A graph as the text of a Python function: readable names, the user's source lines, imports by name."""

import inspect
import keyword
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from stn_fx.compiler.functionalize import module_path
from stn_fx.errors import StnError

WIDTH = 110
_TORCH = str(Path(torch.__file__).parent / "_")[:-1]
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)[^\n]*\n\s*(?P<code>[^\n]+)')
_RESERVED = {"torch", "aten", "load", "Path", "Tensor", "Draws", *keyword.kwlist}


class Imports:
    """Functions that the emitted code calls, imported by name; two of one name get different aliases."""

    def __init__(self) -> None:
        self.alias: dict[Any, str] = {}

    def name(self, function: Any) -> str:
        """Name of a function in the emitted code; it is imported from now on."""
        if function not in self.alias:
            plain = function.__name__
            taken = set(self.alias.values()) | _RESERVED
            self.alias[function] = next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, 99))) if n not in taken)
            module = inspect.getmodule(function)
            if module is None or getattr(module, plain, None) is not function:
                raise StnError(
                    f"The emitted code calls {function!r}, which cannot be imported by name. Define it at the top "
                    f"level of a module (a rule emits only such functions)."
                )
        return self.alias[function]

    def lines(self) -> str:
        """The import statements."""
        lines = ["import math", "import operator", "from pathlib import Path", "", "import torch"]
        lines += ["from torch import Tensor", ""]
        modules: dict[str, list[str]] = {}
        for function, alias in self.alias.items():
            imported = function.__name__ if alias == function.__name__ else f"{function.__name__} as {alias}"
            modules.setdefault(function.__module__, []).append(imported)
        for module, names in sorted(modules.items()):
            line = f"from {module} import {', '.join(sorted(names))}"
            if len(line) > WIDTH:
                line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"
            lines.append(line)
        return "\n".join(lines) + "\n"


def function_code(name: str, module: GraphModule, functions: Imports) -> str:
    """One pass as a function."""
    nodes = list(module.graph.nodes)
    writer = _Writer(functions)
    # Names of functions come first: a variable must not hide one.
    for node in nodes:
        writer.note_functions(node)
    writer.name_nodes(nodes)
    arguments = ", ".join(writer.names[node] for node in nodes if node.op == "placeholder")
    lines = [f"\n\ndef {name}({arguments}):"]
    last, fetched = "", []
    for node in nodes:
        if node.op == "call_function":
            origin = _origin(node)
            if not origin and node.target is operator.getitem:  # a tensor from a table belongs to what follows
                fetched.append(writer.statement(node))
                continue
            if origin and origin != last:
                lines.append(f"    # {origin}")
            last = origin
            lines += [*fetched, writer.statement(node)]
            fetched = []
        elif node.op == "output":
            lines += fetched
            lines.append(f"    return {writer.text(node.args[0])}")
    return "\n".join(lines) + "\n"


def _origin(node: Node) -> str:
    """Module path and the user's own source line, as far as capture knows them."""
    path = module_path(node)
    own = [f for f in _FRAME.finditer(node.meta.get("stack_trace") or "") if not f["file"].startswith(_TORCH)]
    line = f"{own[-1]['code'].strip()}  ({Path(own[-1]['file']).name}:{own[-1]['line']})" if own else ""
    return f"{path}: {line}" if path and line else path or line


class _Writer:
    """Writes the statements of one function."""

    def __init__(self, functions: Imports) -> None:
        self.functions = functions
        self.names: dict[Node, str] = {}

    def note_functions(self, node: Node) -> None:
        """Give the functions that a call names their aliases."""
        values = [node.target, *pytree.tree_leaves((list(node.args), dict(node.kwargs)))]
        for value in values if node.op == "call_function" else ():
            if callable(value) and not isinstance(value, (Node, type)):
                self.callee(value)

    def name_nodes(self, nodes: Iterable[Node]) -> None:
        """A variable for every node; one that would hide a function or module gets an underscore."""
        taken = _RESERVED | set(self.functions.alias.values()) | {"math", "operator"}
        for node in nodes:
            name = node.name
            while name in taken:
                name += "_"
            taken.add(name)
            self.names[node] = name

    def statement(self, node: Node) -> str:
        target = self.names[node]
        if node.target is operator.getitem:
            return f"    {target} = {self.text(node.args[0])}[{self.text(node.args[1])}]"
        arguments = [self.text(a) for a in node.args] + [f"{k}={self.text(v)}" for k, v in node.kwargs.items()]
        head = f"    {target} = {self.callee(node.target)}("
        line = f"{head}{', '.join(arguments)})"
        return line if len(line) <= WIDTH else f"{head}\n{_filled(arguments)}\n    )"

    def callee(self, function: Any) -> str:
        """Text that names a function."""
        if isinstance(function, torch._ops.OpOverload):
            return f"{'' if function.namespace == 'aten' else 'torch.ops.'}{function}"
        module = getattr(function, "__module__", "") or ""
        name = function.__name__
        if getattr(operator, name, None) is function:
            return f"operator.{name}"
        if module == "math" or module == "builtins":
            return f"math.{name}" if module == "math" else name
        if getattr(torch, name, None) is function:
            return f"torch.{name}"
        if getattr(torch.nn.functional, name, None) is function:
            return f"torch.nn.functional.{name}"
        return self.functions.name(function)

    def text(self, value: Any) -> str:
        """Text of an argument."""
        if isinstance(value, Node):
            return self.names[value]
        if isinstance(value, slice):
            return f"slice({self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)})"
        if isinstance(value, tuple):
            inner = ", ".join(self.text(item) for item in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return f"[{', '.join(self.text(item) for item in value)}]"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{key!r}: {self.text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, float) and value != value:
            return "math.nan"
        if isinstance(value, float) and value in (float("inf"), float("-inf")):
            return "math.inf" if value > 0 else "-math.inf"
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, type) or not callable(value):
            return repr(value)
        return self.callee(value)


def _filled(arguments: list[str]) -> str:
    """Arguments over several indented lines, as many on each as fit."""
    lines, line = [], "        "
    for argument in arguments:
        piece = f"{argument},"
        if len(line) + len(piece) + 1 > WIDTH and line.strip():
            lines.append(line.rstrip())
            line = "        "
        line += piece + " "
    return "\n".join([*lines, line.rstrip()])
