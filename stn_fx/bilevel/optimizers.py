"""Optimizers of the four groups of parameters: the defaults, and the checks of those that users bring.

| group | parameters | default |
|---|---|---|
| base | the user's own weights | SGD, learning rate 0.01, momentum 0.9 |
| response | how the weights move with the hyperparameters | the same |
| hyper | raw hyperparameters | RMSprop with corrected bias, learning rate 0.03 |
| scale | raw scales of the perturbation | the same |

The papers take RMSprop itself. Its mean square starts at zero, so its first step is ten times as long as the others,
and 25 steps of one sign move a raw value by 2.6 instead of 0.75: rates fall to nearly zero and scales collapse right
behind the warm-up, where the model is the least trained and the response knows the least.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

from torch import nn
from torch.optim import SGD, Adam, Optimizer

from stn_fx.errors import InputError

Role = Literal["base", "response", "hyper", "scale"]
OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
OptimizerChoice = Optimizer | OptimizerFactory | None

CORRECTED_RMSPROP = partial(Adam, betas=(0.0, 0.99))
"""Adam without momentum is RMSprop with corrected bias."""
DEFAULTS: dict[Role, OptimizerFactory] = {
    "base": partial(SGD, lr=0.01, momentum=0.9),
    "response": partial(SGD, lr=0.01, momentum=0.9),
    "hyper": partial(CORRECTED_RMSPROP, lr=0.03),
    "scale": partial(CORRECTED_RMSPROP, lr=0.03),
}

SOURCES: dict[Role, str] = {
    "base": "stn.base_parameters()",
    "response": "stn.response_parameters()",
    "hyper": "[stn.hparams.raw]",
    "scale": "[stn.hparams.raw_scale]",
}


def resolve_optimizer(
    choice: OptimizerChoice, role: Role, parameters: Iterable[nn.Parameter], decay_is_tuned: bool
) -> Optimizer:
    """The optimizer of one group: built from a factory or the default, or the user's own after a check.

    Args:
        choice: a torch optimizer over exactly the parameters that require a gradient, a factory such as
            `functools.partial(torch.optim.Adam, lr=1e-3)`, or None for the default.
        role: the group.
        parameters: the group's parameters; those that do not require a gradient are left out.
        decay_is_tuned: whether `weight_decay` is among the hyperparameters.

    Raises:
        InputError: the optimizer is over other parameters, or has a weight decay of its own where it does harm.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        hint = ", and leave response=None to runs that do not tune" if role == "response" else ""
        raise InputError(
            f"There is nothing for the {role} optimizer: no parameter of {SOURCES[role]} requires a gradient. Call "
            f"requires_grad_() on those to train, before the transform{hint}."
        )
    if isinstance(choice, Optimizer):
        optimizer = choice
    elif choice is None or callable(choice):
        optimizer = (choice or DEFAULTS[role])(trained)
    else:
        raise InputError(
            f"{role}_optimizer is a {type(choice).__name__}; pass a torch optimizer over {SOURCES[role]}, a factory "
            f"such as functools.partial(torch.optim.Adam, lr=1e-3), or None."
        )
    require_parameters(optimizer, role, trained)
    _check_weight_decay(optimizer, role, decay_is_tuned)
    return optimizer


def require_parameters(optimizer: Optimizer, role: Role, parameters: Iterable[nn.Parameter]) -> None:
    """InputError for stale, foreign and missing parameters: training would go on without a word and learn nothing."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    theirs = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    ours = {id(parameter) for parameter in trained}
    foreign, missing = len(theirs - ours), len(ours - theirs)
    if foreign or missing:
        raise InputError(
            f"The {role} optimizer does not fit the model: {missing} of {len(ours)} parameters to train are missing in "
            f"it, and {foreign} of its own are not among them (of another model, frozen, or replaced since, for "
            f"example by .to() or a new layer). Build it anew over {SOURCES[role]}; freeze what should not be trained "
            f"with requires_grad_(False)."
        )


def _check_weight_decay(optimizer: Optimizer, role: Role, decay_is_tuned: bool) -> None:
    decays = any(group.get("weight_decay", 0) for group in optimizer.param_groups)
    if not decays:
        return
    if role in ("hyper", "scale"):
        raise InputError(
            f"The {role} optimizer has a weight decay, which would pull every raw value to 0, the middle between its "
            f"bounds. Build it with weight_decay=0 (AdamW's default is 0.01)."
        )
    if role == "base" and decay_is_tuned:  # the response's own decay shrinks the response, not the weights
        raise InputError(
            f"The {role} optimizer has a weight decay of its own beside the hyperparameter weight_decay, and both "
            f"would act. Build it with weight_decay=0, or leave weight_decay out of hparams."
        )
