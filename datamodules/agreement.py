"""How far annotators agree."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


def nominal_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha of nominal labels: 1 is full agreement, 0 what chance gives, below it systematic dissent.

    After Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section D: 1 - observed / expected
    disagreement, over the pairs of labels within each unit and over those of all labels.

    Args:
        units: The labels of each unit, from any number of annotators; units with fewer than two are left out.

    Returns:
        None where nothing can be said: there are no pairs, or all labels are the same.
    """
    pairable = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(pairable, Counter[Hashable]())
    labels = totals.total()
    unlike = labels**2 - sum(count**2 for count in totals.values())
    if not unlike:
        return None
    disagreement = sum(
        (unit.total() ** 2 - sum(count**2 for count in unit.values())) / (unit.total() - 1) for unit in pairable
    )
    return 1 - (labels - 1) * disagreement / unlike
