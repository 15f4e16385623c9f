"""Rows, and what follows from them: the store, statistics, claims, figures and the report. Knows numbers, never models.

rows = Store.read("runs/grokking").rows()
times, observed = rows.reached("val/accuracy", 0.99)
"""

from shoal.results.claims import Claim, Sample, Verdict, fingerprint, judge
from shoal.results.comparisons import heatmap, times, times_against, values_against
from shoal.results.figures import Figure, curves, dots, survival
from shoal.results.report import write_report
from shoal.results.rows import Row, Rows
from shoal.results.statistics import Estimate
from shoal.results.store import Store, Table

__all__ = [
    "Claim", "Estimate", "Figure", "Row", "Rows", "Sample", "Store", "Table", "Verdict", "curves", "dots", "fingerprint", "heatmap", "judge",
    "survival", "times", "times_against", "values_against", "write_report",
]  # fmt: skip
