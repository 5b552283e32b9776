"""Settings of the commands and of the Python calls: one dataclass each, checked at construction."""

from controlat.app.settings.attack import AttackSettings, checkpoint_of
from controlat.app.settings.derive import DeriveSettings
from controlat.app.settings.evaluate import EvaluateSettings
from controlat.app.settings.problem import DEMO_EPS, Problem, from_json, settings_from
from controlat.app.settings.schedules import (
    default_schedules,
    names_controller,
    names_factory,
    read_schedule,
)
from controlat.app.settings.search import SearchSettings
from controlat.app.settings.train import TrainSettings

__all__ = [
    "DEMO_EPS",
    "AttackSettings",
    "DeriveSettings",
    "EvaluateSettings",
    "Problem",
    "SearchSettings",
    "TrainSettings",
    "checkpoint_of",
    "default_schedules",
    "from_json",
    "names_controller",
    "names_factory",
    "read_schedule",
    "settings_from",
]
