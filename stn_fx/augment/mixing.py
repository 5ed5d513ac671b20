"""Mixup and CutMix with an own Beta parameter for every example, on tensors whose first axis holds the batch.

Shares are folded to at least one half, `max(s, 1 - s)`: an example stays the larger part of itself, and with alpha
towards 0 nothing is mixed. For mixup that changes no distribution, since the partner is drawn at random.

Shape suffixes: B examples, C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws
from stn_fx.augment.images import check_images

# Below this both gamma variates may be 0, and the share is 1 but for one example in a hundred.
NEVER = 1e-2


@dataclass(frozen=True)
class Mixture:
    """How the examples of a batch are mixed.

    Attributes:
        partner_B: index of the example that each is mixed with.
        share_B: share of the example itself, 1/2 to 1.
        boxes_B4: for CutMix, the rectangle that comes from the partner (top, left, height, width; int64); else None.
    """

    partner_B: Tensor
    share_B: Tensor
    boxes_B4: Tensor | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """Mixed inputs, shaped like `x`, in its dtype."""
        other = x[self.partner_B]
        if self.boxes_B4 is None:
            return torch.lerp(other, x, self._shares(x))
        top, left, height, width = self.boxes_B4[..., None].unbind(1)
        row, column = (torch.arange(size, device=x.device) for size in x.shape[2:])
        rows_BH = (row >= top) & (row < top + height)
        columns_BW = (column >= left) & (column < left + width)
        return torch.where((rows_BH[:, :, None] & columns_BW[:, None, :])[:, None], other, x)

    def targets(self, target: Tensor) -> Tensor:
        """Floating targets (distributions, values) mixed by the shares, whichever form the inputs' mixture has."""
        return torch.lerp(target[self.partner_B], target, self._shares(target))

    def _shares(self, like: Tensor) -> Tensor:
        return self.share_B.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def draw_mixup(x: Tensor, alpha_B: Tensor, draws: Draws, name: str) -> Mixture:
    """Mixup (Zhang et al. 2018, arXiv 1710.09412) of the examples of `x`; `alpha_B` are the Beta parameters."""
    return Mixture(draws.permutation(len(x), x, f"{name}.partner"), _shares(x, alpha_B, draws, name))


def draw_cutmix(x_BCHW: Tensor, alpha_B: Tensor, draws: Draws, name: str) -> Mixture:
    """CutMix (Yun et al. 2019, arXiv 1905.04899); shares are those of the pixels, after the rectangle was cut."""
    check_images(x_BCHW, "cutmix")
    height, width = x_BCHW.shape[2:]
    partner_B, share_B = (
        draws.permutation(len(x_BCHW), x_BCHW, f"{name}.partner"),
        _shares(x_BCHW, alpha_B, draws, name),
    )
    side_B = (1 - share_B).sqrt()
    centre_B2 = draws.uniform((len(x_BCHW), 2), x_BCHW, f"{name}.centre")
    spans = []
    for axis, size in enumerate((height, width)):
        middle = (centre_B2[:, axis] * size).floor()
        half = (side_B * size / 2).floor()
        start, end = (middle - half).clamp(min=0), (middle + half).clamp(max=size)
        spans.append((start, end - start))
    (top, down), (left, across) = spans
    boxes_B4 = torch.stack((top, left, down, across), -1).long()
    return Mixture(partner_B, 1 - down * across / (height * width), boxes_B4)


def _shares(x: Tensor, alpha_B: Tensor, draws: Draws, name: str) -> Tensor:
    alpha_B = alpha_B.detach()
    one_B, other_B = draws.gamma(alpha_B, x, f"{name}.one"), draws.gamma(alpha_B, x, f"{name}.other")
    share_B = torch.maximum(one_B, other_B) / (one_B + other_B)
    return torch.where((alpha_B < NEVER) | ~torch.isfinite(share_B), 1.0, share_B)
