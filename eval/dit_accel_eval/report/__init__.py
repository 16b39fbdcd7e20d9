"""The report of a run: one HTML file that needs no network, and a summary in Markdown."""

from __future__ import annotations

from .build import write_report
from .summary import write_summary

__all__ = ["write_report", "write_summary"]
