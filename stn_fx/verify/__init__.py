"""Numerical verification on the user's machine: ``stn_fx.check`` runs the oracles on the user's own model.

The way: ``subject`` (a copy in float64 with nothing constant) -> ``oracles`` (each compares one pass with the user's
module, run by ``judge``) -> ``result`` (a table and a verdict).
"""

from stn_fx.verify.check import check
from stn_fx.verify.result import CheckResult, OracleResult

__all__ = ["CheckResult", "OracleResult", "check"]
