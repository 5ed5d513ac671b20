"""Which weights a coefficient of the loss acts on: the groups that patterns choose, each weight in one of them."""

from collections.abc import Iterable, Mapping

from stn_fx.hparams import pattern as patterns


def weight_groups(hyperparameters: Iterable[str], weights: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the weights that each hyperparameter of one entry acts on.

    A weight belongs to the first pattern that matches it, else to the hyperparameter without one (`weight_decay` beside
    `weight_decay@layer4`), else to none. Only weights with two or more axes count, as in the usual recipes; a pattern
    that matches none of those takes the vectors that it matches (`weight_decay@**.bias`).

    Args:
        hyperparameters: full names, such as `weight_decay@layer4`, in the order of the user.
        weights: number of axes of each trained parameter by qualified name.
    """
    names = list(hyperparameters)
    groups: dict[str, list[str]] = {}
    left = set(weights)
    for name in sorted(names, key=lambda each: "@" not in each):
        _, at, pattern = name.partition("@")
        matched = [weight for weight in weights if not at or patterns.matches(pattern, weight)]
        matrices = [weight for weight in matched if weights[weight] >= 2]
        groups[name] = [weight for weight in matrices or (matched if at else []) if weight in left]
        left -= set(groups[name])
    return {name: groups[name] for name in names}
