"""What a check found: one record for each oracle, told as a table with a verdict."""

import io
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class OracleResult:
    """One oracle.

    Attributes:
        name: what was compared.
        error: relative error, or for "sites" the number of wrong rows; None where there was nothing to compare.
        tolerance: the largest error that passes.
        note: what is particular, or why it fails.
    """

    name: str
    error: float | None
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not, nothing to compare is."""
        return self.error is None or self.error <= self.tolerance


@dataclass(frozen=True)
class CheckResult:
    """The results of all oracles, and the precision (a dtype's name) that they were computed in."""

    oracles: tuple[OracleResult, ...]
    precision: str

    @property
    def passed(self) -> bool:
        """The verdict: every oracle passed."""
        return all(each.passed for each in self.oracles)

    @property
    def errors(self) -> dict[str, float | None]:
        """Error by oracle."""
        return {each.name: each.error for each in self.oracles}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        records = [{**asdict(each), "passed": each.passed} for each in self.oracles]
        return {"passed": self.passed, "precision": self.precision, "oracles": records}

    def __rich__(self) -> Table:
        verdict = "passed" if self.passed else "FAILED"
        table = Table(title=f"stn_fx.check: {verdict} ({self.precision})", title_justify="left")
        for heading in ("oracle", "error", "tolerance", "", "note"):
            table.add_column(heading, justify="right" if heading in ("error", "tolerance") else "left")
        for each in self.oracles:
            error = "-" if each.error is None else f"{each.error:.1e}"
            table.add_row(each.name, error, f"{each.tolerance:.0e}", "ok" if each.passed else "FAILED", each.note)
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=120)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
