"""The report of a work directory: one self-contained HTML file, and the same in short as Markdown."""

from srpo_jax.evaluation.report.write import write_report

__all__ = ["write_report"]
