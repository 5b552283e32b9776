"""Controls u, the admissible set G, counts of the running cost R(u), schedules u(t), and controllers."""

from controlat.control.controller import Controller, Moment, as_schedule
from controlat.control.cost import Meter
from controlat.control.curves import Curve
from controlat.control.learning_rate import Rate, parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Control, ControlSpace, Knob

__all__ = [
    "Control",
    "ControlSpace",
    "Controller",
    "Curve",
    "Knob",
    "Meter",
    "Moment",
    "Rate",
    "Schedule",
    "as_schedule",
    "load_schedule",
    "parse_rate",
    "parse_schedule",
]
