"""Which selection acts at a site that several choose: the one with a pattern, and of two patterns neither."""

from collections.abc import Iterable, Iterator

from stn_fx.compiler.sites import FoundSite
from stn_fx.errors import InputError
from stn_fx.hparams import Selection


def acting_selections(found: Iterable[FoundSite], selections: list[Selection]) -> dict[FoundSite, Selection]:
    """The one selection that acts at each site that any selection chooses.

    Raises:
        InputError: two patterns choose one site, or a selection is left without any.
    """
    acting: dict[FoundSite, Selection] = {}
    clashes: dict[tuple[str, ...], list[str]] = {}
    chosen: set[int] = set()
    for site in found:
        candidates = [each for each in selections if chooses(each, site)]
        chosen |= {id(each) for each in candidates}
        patterned = [each for each in candidates if each.pattern is not None]
        if len(patterned) > 1:
            clashes.setdefault(tuple(each.text for each in patterned), []).append(site.name)
        elif candidates:
            acting[site] = (patterned or candidates)[0]
    if clashes:
        told = "; ".join(f"{' and '.join(texts)} both choose {', '.join(names)}" for texts, names in clashes.items())
        raise InputError(f"hparams is ambiguous: {told}. Write patterns that do not overlap.")
    idle = [each.text for each in selections if id(each) in chosen and each not in acting.values()]
    if idle:
        raise InputError(
            f"{', '.join(map(repr, idle))} acts nowhere: a selection with a pattern acts at each of its sites. "
            f"Leave it out."
        )
    return acting


def chooses(selection: Selection, site: FoundSite) -> bool:
    """Whether the selection names this site."""
    return site.entry == selection.entry.name and selection.matches(site.name)


def precedence_notes(acting: dict[FoundSite, Selection], selections: list[Selection]) -> Iterator[str]:
    """Where a selection with a pattern took sites from one without, for the report."""
    for selection in selections:
        if selection.pattern is None:
            continue
        taken = [site for site, winner in acting.items() if winner is selection]
        for general in selections:
            if general.pattern is None and any(chooses(general, site) for site in taken):
                yield (
                    f"{selection.text} acts instead of {general.text} at {len(taken)} "
                    f"{'site' if len(taken) == 1 else 'sites'}"
                )
