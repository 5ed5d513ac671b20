"""What to tell a user who names a hyperparameter that does not exist."""

import difflib
from collections.abc import Iterable

from stn_fx.hparams.entry import Catalogue

NOT_TUNABLE = ("lr", "learning_rate", "momentum", "batch_size", "epochs", "optimizer")

WHY_NOT_TUNABLE = (
    "it belongs to the optimization and not to the training objective. Hypergradients flow only through the response "
    "of the converged weights to the objective, so a learning rate cannot be tuned this way; set it on the optimizer."
)


def describe_unknown(names: Iterable[str], catalogue: Catalogue) -> str:
    """One message about all unknown names, with the nearest known name or the reason, and the catalogue."""
    lines = [f"  {name}: {_hint(name, catalogue)}" for name in names]
    return "\n".join(["Unknown hyperparameters:", *lines, f"The catalogue has: {', '.join(catalogue.names)}."])


def _hint(name: str, catalogue: Catalogue) -> str:
    plain = name.strip().lower().replace("-", "_").replace(" ", "_")
    if plain in NOT_TUNABLE:
        return WHY_NOT_TUNABLE
    head, _, tail = plain.partition(".")
    if tail and head in catalogue:
        entry = catalogue[head]
        if entry.pattern_over == "modules":
            return f"to choose a place in the model, write {head}@{name.partition('.')[2]}"
        return f"components of {head} are {', '.join(component.name for component in entry.components)}"
    near = difflib.get_close_matches(plain, catalogue.names, n=1)
    return f"did you mean {near[0]}?" if near else "nothing in the catalogue is named like this"
