"""Tuned values back into the user's own modules, where they have a place."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from stn_fx.compiler.plan import Plan, SitePlan
from stn_fx.hparams import CATALOGUE

RATE_ATTRIBUTES = {"dropout": ("p",), "drop_path": ("drop_prob", "p")}
"""Where a module that is a site itself keeps its rate: torch and torchvision in ``p``, others in ``drop_prob``."""

_IN_LOSS = "it acts in the training loss"


@dataclass(frozen=True)
class Finalized:
    """What was done with each tuned value.

    Attributes:
        written: qualified attribute of the model -> the value that it holds now.
        without_place: hyperparameter -> why the plain model cannot hold it (all places, where it acts at several).
    """

    written: dict[str, float] = field(default_factory=dict)
    without_place: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{attribute} = {value:.4g}" for attribute, value in self.written.items()]
        lines += [f"{name} has no place in the model: {reason}" for name, reason in self.without_place.items()]
        return "\n".join(lines) or "no hyperparameters"


def write_rates(model: nn.Module, plan: Plan, values: Mapping[str, float]) -> Finalized:
    """Write constrained ``values`` (by hyperparameter name) into the rates of the model's own dropouts and drop paths.

    A value that has no place is left out and told with the reason: sites that stn_fx inserted, augmentations, terms of
    the loss, and rates that a forward reads from where they cannot be found without guessing.
    """
    modules = dict(model.named_modules())
    written: dict[str, float] = {}
    reasons: dict[str, list[str]] = {}
    for site in plan.sites:
        for _, name in site.hyperparameters:
            place = _place(site, modules, plan)
            if isinstance(place, str):
                reasons.setdefault(name, []).append(place)
                continue
            module, attribute = place
            setattr(module, attribute, float(values[name]))
            written[f"{_name_of(module, modules)}.{attribute}".lstrip(".")] = float(values[name])
    without_place = {name: "; ".join(dict.fromkeys(found)) for name, found in reasons.items()}
    for each in plan.hyperparameters:
        if not any(name == each.name for site in plan.sites for _, name in site.hyperparameters):
            without_place[each.name] = _IN_LOSS
    return Finalized(written, without_place)


def _place(site: SitePlan, modules: dict[str, nn.Module], plan: Plan) -> tuple[nn.Module, str] | str:
    """(module, attribute) that holds the rate of a site, or why there is none."""
    if site.entry not in RATE_ATTRIBUTES:
        kind = CATALOGUE[site.entry].kind if site.entry in CATALOGUE else "site"
        if kind == "activation":
            return _IN_LOSS
        if kind == "input" and not site.inserted:
            return f"{site.name} keeps the value that it was built with; build it anew with this one"
        return (
            f"{site.entry} acts on the input"
            if kind == "input"
            else f"no module of the model does what {site.entry} does"
        )
    if site.inserted:
        return f"the site at {site.name} was inserted"
    module = modules.get(site.name)
    if isinstance(module, nn.MultiheadAttention):
        return module, "dropout"
    if module is not None:
        for attribute in RATE_ATTRIBUTES[site.entry]:
            rate = getattr(module, attribute, None)
            # timm's and transformers' drop paths take None for "off".
            if _is_rate(rate) or (attribute == "drop_prob" and hasattr(module, attribute) and rate is None):
                return module, attribute
        return f"{site.name} ({type(module).__name__}) keeps its rate in no known attribute"
    return _functional_place(site, modules, plan)


def _functional_place(site: SitePlan, modules: dict[str, nn.Module], plan: Plan) -> tuple[nn.Module, str] | str:
    """A functional dropout reads its rate from its module: known where one value and one attribute fit each other."""
    path, _, _ = site.name.rpartition(".")
    module = modules.get(path)
    if module is None:
        return f"no module holds the rate of the functional dropout {site.name}"
    siblings = [other for other in plan.sites if _is_functional(other, path, modules)]
    rates = [
        name for name, value in vars(module).items() if "drop" in name and _is_rate(value) and value == site.own_rate
    ]
    if len({other.hyperparameters for other in siblings}) != 1 or len(rates) != 1:
        return f"which attribute of {path or 'the model'} holds the rate of the functional dropout there is not decided"
    return module, rates[0]


def _is_functional(site: SitePlan, path: str, modules: dict[str, nn.Module]) -> bool:
    return not site.inserted and site.name not in modules and site.name.rpartition(".")[0] == path


def _is_rate(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _name_of(module: nn.Module, modules: dict[str, nn.Module]) -> str:
    return next(name for name, other in modules.items() if other is module)
