"""A run as one page for people: what it climbed, at what cost, and whether the reward was followed or fooled.

Reads a run's folder and writes HTML without scripts. Knows nothing of models or training.
"""

from .report import ReportConfig, report

__all__ = ["ReportConfig", "report"]
