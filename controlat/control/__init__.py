"""Controls u, the admissible set G, the running cost R(u), and functions of time t -> u."""

from controlat.control.cost import Meter
from controlat.control.curves import Curve
from controlat.control.learning_rate import Rate, parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Control, ControlSpace, Knob

__all__ = [
    "Control",
    "ControlSpace",
    "Curve",
    "Knob",
    "Meter",
    "Rate",
    "Schedule",
    "load_schedule",
    "parse_rate",
    "parse_schedule",
]
