# SPDX-License-Identifier: Apache-2.0
"""What runs are looked at by: analyses in files, and pages."""

from .analyses import ANALYSES, Analyzed, Skipped, Written, analyze
from .page import write_report

__all__ = ["ANALYSES", "Analyzed", "Skipped", "Written", "analyze", "write_report"]
