"""Show runs, findings, comparisons and sweeps in one self-contained HTML file."""

from trimtab.report.build import build_report

__all__ = ["build_report"]
