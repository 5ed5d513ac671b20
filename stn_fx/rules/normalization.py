"""Batch, layer, group, instance and RMS norm.

Without its affine part the Jacobian of each of these norms is symmetric, so the fused *backward* kernel of the norm
also computes its tangent, and serves again as the tangent's backward.  The affine part is a scale and a shift, which
differ per example.  The linearized pass uses batch statistics without touching the running ones.

Statistics of a batch norm belong to all examples, perturbations to one each.  What a change of weights does to a model
with batch norms it does with other statistics as well, so neither pass may take them for constants:

- In the linearized pass the tangents of the statistics are means over the batch, in which perturbations of its examples
  cancel.  An example would seem free to scale a row of weights that the norm scales back for all; the response would
  answer with that first.  Where examples share perturbations in groups, each group has its own tangents of the
  statistics, as if the whole batch had been perturbed like it.
- In evaluation running statistics are constants to autograd, though other weights would have been trained with others.
  For the hypergradient they follow: see :func:`following`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from stn_fx.errors import InputError
from stn_fx.rules.rule import REGISTRY, Emitter, Rule
from stn_fx.rules.weighted import add_terms, aligned

aten = torch.ops.aten


class _SymmetricTangent(torch.autograd.Function):
    """A linear map given by a backward kernel that is its own adjoint."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Any, tangent: Tensor, *saved: Tensor) -> Tensor:
        return kernel(tangent, *saved)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.kernel = inputs[0]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        return (None, ctx.kernel(cotangent, *saved), *(None,) * len(saved))


def normalized_tangent(kind: str, tangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, options: list[Any]) -> Tensor:
    """Tangent of the norm without its affine part along ``tangent``, from the statistics of the primal."""
    return _SymmetricTangent.apply(_Kernel(kind, tuple(options)), tangent, x, mean, rstd)


class _Kernel:
    """Backward kernel of a norm without affine part, as a function of (cotangent, x, mean, rstd)."""

    def __init__(self, kind: str, options: tuple[Any, ...]) -> None:
        self.kind, self.options = kind, options

    def __call__(self, cotangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        if self.kind == "batch":
            eps, *groups = self.options
            if groups:
                return _in_groups(cotangent, x, mean, rstd, *groups)
            return aten.native_batch_norm_backward(
                cotangent, x, None, None, None, mean, rstd, True, eps, [True, False, False]
            )[0]
        if self.kind == "layer":
            (shape,) = self.options
            mask = [True, False, False]
            return aten.native_layer_norm_backward(cotangent, x, list(shape), mean, rstd, None, None, mask)[0]
        (groups,) = self.options
        n, c = x.shape[:2]
        spatial = x.numel() // max(1, n * c)
        return aten.native_group_norm_backward(
            cotangent.contiguous(), x.contiguous(), mean, rstd, None, n, c, spatial, groups, [True, False, False]
        )[0]


def _told_groups(emit: Emitter, node: Node) -> list[int]:
    """What `_means_of_groups` needs; nothing where there are no groups, or none that could have statistics."""
    axis, outer, inner = emit.layout(node)
    # The batch along an axis of channels or positions: its examples are no rows.
    return [] if emit.groups is None or axis != 0 else [emit.groups.size, emit.groups.before, outer, inner]


def _in_groups(tangent: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *groups: int) -> Tensor:
    """Tangent of a batch norm for groups of examples; within each it is symmetric, as that of the batch is.

    The statistics are those of the batch, their tangents those of the group, told as to `_means_of_groups`.  With means
    over the group, ``r = rstd`` and ``q = r^2 mean((x - m) t)`` it is ``r (t - mean(t) - (x - m) q)``.  Memory is what
    costs, so ``x`` and ``t`` are read as few times as can be.
    """
    dtype = torch.promote_types(tangent.dtype, mean.dtype)
    x, t = x.to(dtype), tangent.to(dtype)
    shift_RC, q_RC = (_means_of_groups(each, *groups) for each in (_row_means(t), _row_means(x, t)))
    q_RC = (q_RC - mean * shift_RC) * rstd.square()
    constant, slope = (_like_rows(each, x.ndim) for each in ((q_RC * mean - shift_RC) * rstd, -q_RC * rstd))
    return torch.addcmul(constant, x, slope).addcmul_(t, per_channel(rstd, x.ndim)).to(tangent.dtype)


def _means_of_groups(means_RC: Tensor, size: int, before: int, outer: int, inner: int) -> Tensor:
    """Means over the examples of each one's group, for every row (outer B inner, C)."""
    rows, channels = means_RC.shape
    means_BC = means_RC.reshape(outer, -1, inner, channels).mean((0, 2))
    batch = len(means_BC)
    behind = -(before + batch) % size
    # Padded, not added by index: sums in one order on every device.
    sums = F.pad(means_BC, (0, 0, before, behind)).reshape(-1, size, channels).sum(1)
    counts = F.pad(means_BC.new_ones(batch), (before, behind)).reshape(-1, size).sum(1)
    means_BC = (sums / counts[:, None]).repeat_interleave(size, 0)[before : before + batch]
    return means_BC[None, :, None].expand(outer, -1, inner, -1).reshape(rows, channels)


def _row_means(x: Tensor, factor: Tensor | None = None) -> Tensor:
    """Means of ``x``, or of its product with the factor, over all positions: (rows, C)."""
    if x.ndim == 2:
        return x if factor is None else x * factor
    x = x.flatten(2)
    if factor is None:
        return x.mean(2)
    # vecdot: a product and a sum; einsum makes one product of matrices for each row, and takes three times as long.
    return torch.linalg.vecdot(x, factor.flatten(2)) / x.shape[2]


def _like_rows(values_RC: Tensor, ndim: int) -> Tensor:
    """Values of rows and channels, shaped to broadcast over ``ndim`` axes."""
    return values_RC.reshape(*values_RC.shape, *(1,) * (ndim - 2))


def several_values(x: Tensor) -> Tensor:
    """``x``, unless a batch norm in training has a single value of each of its channels, and so no variance.

    torch.nn.functional refuses it too, but outside of the operator that is captured.
    """
    if x.numel() <= x.shape[1]:
        raise InputError(
            f"A batch norm has one value only for each of its {x.shape[1]} channels in this batch (shape "
            f"{tuple(x.shape)}): no variance to divide by. Train on larger batches, and leave out a last one that is "
            f"too small (drop_last=True in the DataLoader)."
        )
    return x


def standardize(kind: str, x: Tensor, options: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The norm without its affine part: (values, mean, 1/std); running statistics of a batch norm are updated."""
    if kind == "batch":
        several_values(x)
        eps, momentum, running_mean, running_var = options
        return aten.native_batch_norm(x, None, None, running_mean, running_var, True, momentum, eps)
    if kind == "layer":
        shape, eps = options
        return aten.native_layer_norm(x, list(shape), None, None, eps)
    groups, eps = options
    n, c = x.shape[:2]
    return aten.native_group_norm(x.contiguous(), None, None, n, c, x.numel() // max(1, n * c), groups, eps)


def per_channel(vector: Tensor, ndim: int) -> Tensor:
    """A vector (C,) shaped to broadcast along axis 1 of a tensor of ``ndim`` axes."""
    return vector.reshape(-1, *(1,) * (ndim - 2))


def affine(values: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """``values * weight + bias`` in one sweep where both are there."""
    if weight is None or bias is None:
        return values if weight is None and bias is None else values * weight if bias is None else values + bias
    return torch.addcmul(bias, values, weight)


class _Norm(Rule):
    """Shared: standardize, then scale and shift; subclasses say how the standardizing part behaves."""

    per_example_arguments = ("weight", "bias")
    name = "normalization"
    kind = ""
    channel_axis = 1

    def options(self, emit: Emitter, node: Node) -> tuple[list[Any], list[Any]]:
        """Options of :func:`standardize` and of the backward kernel."""
        raise NotImplementedError

    def _vector(self, emit: Emitter, node: Node, vector: Any) -> Any:
        if vector is None or self.channel_axis == -1:
            return emit.value(vector)
        return emit.call(per_channel, emit.value(vector), emit.rank(node))

    def changes(self, emit: Emitter, node: Node) -> tuple[Node | None, Node | None]:
        stacks = [emit.stack(emit.argument(node, name)) for name in ("weight", "bias")]
        return tuple(  # type: ignore[return-value]
            None if stack is None else aligned(emit, node, stack, self._channel(emit, node)) for stack in stacks
        )

    def _channel(self, emit: Emitter, node: Node) -> int:
        return self.channel_axis

    def plain(self, emit: Emitter, node: Node, **replaced: Any) -> Node:
        """The norm itself."""
        return emit.copy(node, **replaced)

    def base(self, emit: Emitter, node: Node) -> Node:
        return self.plain(emit, node)

    def respond(self, emit: Emitter, node: Node) -> Node:
        weight, bias = self.changes(emit, node)
        if weight is None and bias is None and not emit.follows_statistics(node):
            return self.plain(emit, node)
        plain = self._without_affine(emit, node)
        scale = weight if weight is not None else self._vector(emit, node, emit.argument(node, "weight"))
        shift = bias if bias is not None else self._vector(emit, node, emit.argument(node, "bias"))
        return emit.call(affine, plain, scale, shift)

    def _without_affine(self, emit: Emitter, node: Node) -> Node:
        if not emit.follows_statistics(node):
            return self.plain(emit, node, weight=None, bias=None)
        statistics = [emit.value(emit.argument(node, n)) for n in ("running_mean", "running_var")]
        eps = emit.argument(node, "eps", 1e-5)
        told = _told_groups(emit, node)
        return emit.call(following, emit.value(node.args[0]), *statistics, eps, self.kind == "batch", *told)

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x = node.args[0]
        forward_options, backward_options = self.options(emit, node)
        statistics = emit.call(standardize, self.kind, emit.value(x), forward_options)
        values = emit.item(statistics, 0)
        weight = self._vector(emit, node, emit.argument(node, "weight"))
        bias = self._vector(emit, node, emit.argument(node, "bias"))
        primal = emit.call(affine, values, weight, bias)
        tangent = None
        if emit.tangent(x) is not None:
            mean, rstd = emit.item(statistics, 1), emit.item(statistics, 2)
            tangent = emit.call(
                normalized_tangent, self.kind, emit.tangent(x), emit.value(x), mean, rstd, backward_options
            )
            if weight is not None:
                tangent = emit.call(aten.mul.Tensor, tangent, weight)
        return primal, self.affine_tangent(emit, node, values, tangent)

    def affine_tangent(self, emit: Emitter, node: Node, values: Node, tangent: Node | None) -> Node | None:
        weight_change, bias_change = self.changes(emit, node)
        if weight_change is not None and tangent is not None:
            tangent = emit.call(torch.addcmul, tangent, values, weight_change)
        elif weight_change is not None:
            tangent = emit.call(aten.mul.Tensor, values, weight_change)
        return add_terms(emit, tangent, bias_change)


@REGISTRY.register
class BatchNormRule(_Norm):
    """``batch_norm``: batch statistics in training, a fixed scale and shift in evaluation."""

    name = "batch norm"
    kind = "batch"
    targets = (aten.batch_norm.default,)

    def plain(self, emit: Emitter, node: Node, **replaced: Any) -> Node:
        if emit.argument(node, "training"):
            replaced["input"] = emit.call(several_values, emit.value(node.args[0]))
        return emit.copy(node, **replaced)

    def options(self, emit: Emitter, node: Node) -> tuple[list[Any], list[Any]]:
        eps = emit.argument(node, "eps", 1e-5)
        running = ("running_mean", "running_var")
        followed = [emit.value(emit.argument(node, n)) if emit.updates_buffers else None for n in running]
        momentum = emit.argument(node, "momentum") if emit.updates_buffers else 0.0
        return [eps, momentum, *followed], [eps, *_told_groups(emit, node)]

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        if emit.argument(node, "training"):
            return super().linearize(emit, node)
        return fixed_statistics_tangent(self, emit, node)


def fixed_statistics_tangent(rule: _Norm, emit: Emitter, node: Node) -> tuple[Any, Any]:
    """Linearized code of a norm that uses its running statistics: a fixed scale and shift per channel."""
    x = node.args[0]
    mean, variance = (emit.value(emit.argument(node, n)) for n in ("running_mean", "running_var"))
    rank, eps = emit.rank(node), emit.argument(node, "eps", 1e-5)
    primal = emit.copy(node)
    tangent = None
    if emit.tangent(x) is not None:
        weight = emit.value(emit.argument(node, "weight"))
        scale = emit.call(inference_scale, variance, weight, eps, rank)
        tangent = emit.call(aten.mul.Tensor, emit.tangent(x), scale)
    if rule.changes(emit, node) == (None, None):
        return primal, tangent
    values = emit.call(torch.nn.functional.batch_norm, emit.value(x), mean, variance, None, None, False, 0.0, eps)
    return primal, rule.affine_tangent(emit, node, values, tangent)


def following(
    x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, over_batch: bool, *groups: int
) -> Tensor:
    """``x`` standardized by running statistics, whose derivatives are those of the statistics of ``x``.

    The mean changes by as much as that of ``x`` does, the variance by the same share as that of ``x``, so that scaling
    ``x`` moves the result by no more than both means differ.  A variance far below ``eps`` has no say.  Without
    ``over_batch`` (instance norm) running statistics are means over the instances.  With groups, told as to
    `_means_of_groups`, each has derivatives of its own statistics.
    """
    return _Following.apply(x, running_mean, running_var, eps, over_batch, groups)  # type: ignore[no-any-return]


class _Following(torch.autograd.Function):
    """With ``r = 1 / sqrt(running_var + eps)``, ``c = r^2 running_var / (var(x) + eps)`` and means over the axes of the
    statistics, ``dy = r (dx - mean(dx)) - y c mean((x - mean(x)) dx)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, running_mean: Tensor, running_var: Tensor, eps: float, over_batch: bool, groups: tuple[int, ...]
    ) -> Tensor:
        return F.batch_norm(x, running_mean, running_var, None, None, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.over_batch, ctx.groups = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, running_mean, running_var = ctx.saved_tensors
        dtype = torch.promote_types(x.dtype, running_mean.dtype)
        x, dy = x.to(dtype), gradient.to(dtype)

        def means(each_RC: Tensor) -> Tensor:
            return _means_of_groups(each_RC, *ctx.groups) if ctx.groups else each_RC.mean(0, keepdim=True)

        mean_RC, row_mean_dy_RC = _row_means(x), _row_means(dy)
        if ctx.over_batch:
            mean_RC = means(mean_RC)
        # Only centred values are multiplied: the share is large where the variance is small, as in a group of one
        # example, and would bring out what rounding leaves of the mean.
        centred = x - _like_rows(mean_RC, x.ndim)
        variance_RC = means(_row_means(centred, centred))
        r, mean_dy_RC = torch.rsqrt(running_var + ctx.eps), means(row_mean_dy_RC)
        mean_ydy_RC = r * means(_row_means(centred, dy) + (mean_RC - running_mean) * row_mean_dy_RC)
        share_RC = mean_ydy_RC * r.square() * running_var / (variance_RC + ctx.eps)
        constant, slope = (_like_rows(each, x.ndim) for each in (-r * mean_dy_RC, -share_RC))
        change = torch.addcmul(constant, centred, slope).addcmul_(dy, per_channel(r, x.ndim))
        return change.to(gradient.dtype), None, None, None, None, None


def inference_scale(variance: Tensor, weight: Tensor | None, eps: float, ndim: int) -> Tensor:
    """Derivative of an evaluation-mode batch norm: weight / sqrt(variance + eps), per channel."""
    scale = torch.rsqrt(variance + eps)
    return per_channel(scale if weight is None else scale * weight, ndim)


@REGISTRY.register
class LayerNormRule(_Norm):
    """``layer_norm`` over the trailing axes."""

    name = "layer norm"
    kind = "layer"
    targets = (aten.layer_norm.default,)
    channel_axis = -1

    def options(self, emit: Emitter, node: Node) -> tuple[list[Any], list[Any]]:
        shape = list(node.args[1])
        return [shape, emit.argument(node, "eps", 1e-5)], [shape]


@REGISTRY.register
class GroupNormRule(_Norm):
    """``group_norm``."""

    name = "group norm"
    kind = "group"
    targets = (aten.group_norm.default,)

    def options(self, emit: Emitter, node: Node) -> tuple[list[Any], list[Any]]:
        groups = emit.argument(node, "num_groups")
        return [groups, emit.argument(node, "eps", 1e-5)], [groups]


@REGISTRY.register
class InstanceNormRule(_Norm):
    """``instance_norm``: a group norm with one channel a group, or a fixed scale by running statistics."""

    name = "instance norm"
    kind = "group"
    targets = (aten.instance_norm.default,)

    def options(self, emit: Emitter, node: Node) -> tuple[list[Any], list[Any]]:
        channels = emit.static_size(node, 1)
        return [channels, emit.argument(node, "eps", 1e-5)], [channels]

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        if emit.argument(node, "use_input_stats"):
            primal, tangent = super().linearize(emit, node)
            tracked = emit.updates_buffers and emit.argument(node, "running_mean") is not None
            return emit.copy(node) if tracked else primal, tangent
        return fixed_statistics_tangent(self, emit, node)


@REGISTRY.register
class RMSNormRule(_Norm):
    """``rms_norm`` over the trailing axes: ``x * rsqrt(mean(x^2) + eps) * weight``."""

    name = "RMS norm"
    targets = (aten.rms_norm.default,)
    channel_axis = -1

    def linearize(self, emit: Emitter, node: Node) -> tuple[Any, Any]:
        x, axes, eps = emit.value(node.args[0]), len(node.args[1]), emit.argument(node, "eps")
        primal = emit.copy(node)
        values = emit.copy(node, weight=None)
        tangent = None
        if emit.tangent(node.args[0]) is not None:
            tangent = emit.call(rms_tangent, emit.tangent(node.args[0]), x, axes, eps)
            weight = emit.value(emit.argument(node, "weight"))
            if weight is not None:
                tangent = emit.call(aten.mul.Tensor, tangent, weight)
        return primal, self.affine_tangent(emit, node, values, tangent)

    def respond(self, emit: Emitter, node: Node) -> Node:
        weight, _ = self.changes(emit, node)
        if weight is None:
            return emit.copy(node)
        return emit.call(aten.mul.Tensor, emit.copy(node, weight=None), weight)


def rms_tangent(tangent: Tensor, x: Tensor, axes: int, eps: float | None) -> Tensor:
    """Tangent of ``x * r``, r = rsqrt(mean(x^2) + eps): ``r v - x r^3 mean(x v)`` over the last ``axes`` axes."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    over = tuple(range(-axes, 0))
    r = torch.rsqrt(x.square().mean(over, keepdim=True) + eps)
    return r * tangent - x * r**3 * (x * tangent).mean(over, keepdim=True)
