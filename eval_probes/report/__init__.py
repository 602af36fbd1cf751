"""The report of a run: one HTML file with its curves, its scores and pictures of what the encoder sees."""

from eval_probes.report.build import build_report

__all__ = ["build_report"]
