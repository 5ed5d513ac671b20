"""Label smoothing with an own mass for every example, as soft targets.

Source: Szegedy et al. 2016 (arXiv 1512.00567), section 7: q(k) = (1 - s) * [k = y] + s / C.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from stn_fx.errors import InputError


def soft_targets(output: Tensor, target: Tensor, smoothing_B: Tensor) -> Tensor:
    """Target distributions over the classes on axis 1, smoothed by an own mass for every example.

    Args:
        output: scores (B, C, ...), which tell the number of classes and the dtype.
        target: class indices (B, ...) or distributions shaped like `output`.
        smoothing_B: mass in [0, 1) that is spread evenly over all classes.

    Returns:
        Distributions shaped like `output`.

    Raises:
        InputError: output and target do not have these shapes, or a class index is not in [0, C).
    """
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.ndim < 2:
        raise InputError(
            "label_smoothing needs scores (B, C, ...) as the model's output and class indices or distributions as the "
            "target, both tensors. For other outputs pass loss=Objective(train=...), which sees the smoothing mass of "
            "every example as hyperparameters['label_smoothing'], or leave label_smoothing out."
        )
    classes = output.shape[1]
    if target.is_floating_point():
        if target.shape != output.shape:
            raise InputError(
                f"label_smoothing: the target's distributions have shape {tuple(target.shape)}, the scores "
                f"{tuple(output.shape)}. Give both the same shape, or class indices as whole numbers."
            )
    else:
        if target.shape != output.shape[:1] + output.shape[2:]:
            raise InputError(
                f"label_smoothing: the target has shape {tuple(target.shape)}, which does not fit scores of shape "
                f"{tuple(output.shape)} with the classes on axis 1. Reshape one of the two in the model or the loader, "
                f"or pass loss=Objective(train=...)."
            )
        if bool(((target < 0) | (target >= classes)).any()):
            raise InputError(
                f"label_smoothing: class indices must be in 0..{classes - 1}, and the target holds others (a value to "
                f"be ignored, such as -100?). Pass loss=Objective(train=...), or leave label_smoothing out."
            )
        target = F.one_hot(target.long(), classes).movedim(-1, 1)
    # Under autocast losses compute in the wide dtype of the hyperparameters: bfloat16 would round the smoothing away.
    lowered = torch.is_autocast_enabled(output.device.type)
    dtype = torch.promote_types(output.dtype, smoothing_B.dtype) if lowered else output.dtype
    smoothing = smoothing_B.to(dtype).reshape(-1, *[1] * (output.ndim - 1))
    return (1.0 - smoothing) * target.to(dtype) + smoothing / classes


def require_soft_targets(loss: Callable[[Tensor, Tensor], Tensor], output: Tensor, target: Tensor) -> None:
    """Try once whether `loss` understands soft targets: unsmoothed ones must give the loss of the hard targets.

    Raises:
        InputError: it does not, with its own reason.
    """
    output = output.detach()
    unsmoothed = soft_targets(output, target, torch.zeros(output.shape[0], device=output.device))
    why = "it gives another value for one-hot targets than for the same class indices"
    try:
        soft, hard = loss(output, unsmoothed), loss(output, target)
        if torch.allclose(soft, hard.to(soft.dtype), rtol=1e-3, atol=1e-5):
            return
    except Exception as error:  # whatever a user's loss raises
        why = f"it raised {type(error).__name__}: {error}"
    raise InputError(
        f"The hyperparameter label_smoothing acts on soft targets, which this loss does not understand: {why}. Use a "
        f"loss that takes distributions over classes (torch.nn.functional.cross_entropy does), pass "
        f"loss=Objective(train=...) and use hyperparameters['label_smoothing'] there, or leave label_smoothing out."
    )
