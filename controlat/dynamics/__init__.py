"""The controlled system z' = S(z, u): its state, one outer step, roll-outs, recordings, the adjoint step."""

from controlat.dynamics.adjoint import pullback
from controlat.dynamics.driver import Driver, Field, SGDSettings, Step
from controlat.dynamics.finite_differences import verify
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec
from controlat.dynamics.state import State

__all__ = [
    "Driver",
    "Field",
    "Recording",
    "RunSpec",
    "SGDSettings",
    "State",
    "Step",
    "pullback",
    "rollout",
    "verify",
]
