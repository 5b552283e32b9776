"""The shapes of the files that a run leaves: each is checked when it is read, and an error names the field.

Types are strict: a text is not a number, 1.0 is no count, and numbers are finite. Fields that are not listed
are let through, so that files of later releases can be read. What is written as null has no value.
"""

from controlat.records.criterion import CriterionLine, Full, Objective
from controlat.records.evaluation import Evaluation
from controlat.records.fields import Settings, settings_of
from controlat.records.reading import checked, missing, read_epochs, read_record
from controlat.records.result import Result
from controlat.records.search import SearchResult
from controlat.records.training import Calibrated, Checkpoint, LogLine

__all__ = [
    "Calibrated",
    "Checkpoint",
    "CriterionLine",
    "Evaluation",
    "Full",
    "LogLine",
    "Objective",
    "Result",
    "SearchResult",
    "Settings",
    "checked",
    "missing",
    "read_epochs",
    "read_record",
    "settings_of",
]
