"""A layer with an operator of its own, brought in by one decorator.

`snake` is a custom operator, which stn_fx cannot look into: without the rule its parameter does not respond, and
tangents pass through it by finite differences.
"""

import torch
from torch import Tensor, nn

import stn_fx
from stn_fx.rules import Rule, load_builtin_rules
from stn_fx.rules.weighted import aligned

rules = load_builtin_rules().copy()


def formula(x: Tensor, a: Tensor) -> Tensor:
    return x + (a * x).sin().square() / a


snake = torch.library.custom_op("examples::snake", formula, mutates_args=())  # in earnest, a fused kernel
snake.register_fake(lambda x, a: torch.empty_like(x))
snake.register_autograd(
    lambda ctx, g: torch.func.vjp(formula, *ctx.saved_tensors)[1](g),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Snake(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake(x, self.a)


@rules.register
class SnakeRule(Rule):
    name, targets, per_example_arguments = "snake", (torch.ops.examples.snake.default,), ("a",)

    def respond(self, emit, node):
        x, stack = emit.value(node.args[0]), emit.stack(node.args[1])  # a stack is (B, C): one row for each example
        return emit.copy(node) if stack is None else emit.call(formula, x, aligned(emit, node, stack))

    def linearize(self, emit, node):
        x, a, stack = emit.value(node.args[0]), emit.value(node.args[1]), emit.stack(node.args[1])
        da = 0.0 if stack is None else aligned(emit, node, stack)
        return emit.copy(node), emit.call(tangent, x, a, emit.tangent_or_zeros(node.args[0]), da)


def tangent(x: Tensor, a: Tensor, dx: Tensor, da: Tensor | float) -> Tensor:
    return dx * (1 + (2 * a * x).sin()) + da * (x * (2 * a * x).sin() / a - (a * x).sin().square() / a**2)


stn = stn_fx.transform(nn.Sequential(nn.Linear(8, 16), Snake(16)), "weight_decay", (torch.randn(4, 8),), rules=rules)
print(stn.report)
