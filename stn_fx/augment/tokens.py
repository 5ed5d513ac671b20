"""Word dropout and span masking of token inputs, with own rates for every example.

Shape suffixes: B examples, T tokens.
"""

import torch
from torch import Tensor

from stn_fx.augment.draws import Draws


def mask_words(tokens_BT: Tensor, rate_B: Tensor, draws: Draws, name: str, mask_token: int, padding: int) -> Tensor:
    """Tokens with each replaced by `mask_token` with the example's own probability; padding stays.

    Args:
        tokens_BT: integer tokens (B, T).
        rate_B: probabilities in [0, 1].
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
        mask_token: what stands for a dropped token.
        padding: the token that is never dropped; -1 for none.
    """
    unit_BT = draws.uniform(tokens_BT.shape, rate_B, name)
    masked_BT = unit_BT < rate_B.detach().to(unit_BT.dtype)[:, None]
    return tokens_BT.masked_fill(masked_BT & (tokens_BT != padding), mask_token)


def mask_spans(
    tokens_BT: Tensor,
    rate_B: Tensor,
    length_B: Tensor,
    max_length: int,
    draws: Draws,
    name: str,
    mask_token: int,
    padding: int,
) -> Tensor:
    """Tokens with spans replaced by `mask_token` (SpanBERT, arXiv 1907.10529); arguments as for `mask_words`.

    A span starts at each place, also before the first token, with the probability that masks a share of `rate_B` of
    the tokens: `1 - (1 - rate)^(1 / length)`; spans may overlap.

    Args:
        tokens_BT: integer tokens (B, T).
        rate_B: share of tokens that are masked.
        length_B: whole length of a span; less than 1 counts as 1.
        max_length: the largest length that any example can have.
        draws: source of the random numbers.
        name: what they are for, unique within one pass.
        mask_token: what stands for a masked token.
        padding: the token that is never masked; -1 for none.
    """
    tokens = tokens_BT.shape[1]
    unit_BS = draws.uniform((len(tokens_BT), tokens + max_length), rate_B, name)
    rate_B1 = rate_B.detach().to(unit_BS.dtype)[:, None]
    length_B1 = length_B.detach().to(unit_BS.dtype).clamp(1, max(1, max_length))[:, None]
    # log1p and expm1: rates near 0 must not round to nothing else.
    starts_BS = unit_BS < -torch.expm1(torch.log1p(-rate_B1) / length_B1)
    count_BS = torch.nn.functional.pad(starts_BS.to(torch.int32).cumsum(1), (1, 0))
    # A token is masked where a span has started at one of the last `length` places, its own included.
    after_BT = torch.arange(max_length + 1, max_length + tokens + 1, device=tokens_BT.device).expand(tokens_BT.shape)
    before_BT = after_BT - length_B1.to(after_BT.dtype)
    masked_BT = count_BS.gather(1, after_BT) > count_BS.gather(1, before_BT)
    return tokens_BT.masked_fill(masked_BT & (tokens_BT != padding), mask_token)
