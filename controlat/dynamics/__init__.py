"""The controlled system z' = S(z, u): its state, one outer step, roll-outs, recordings, the adjoint step."""

from controlat.dynamics.adjoint import pullback, state, verify
from controlat.dynamics.driver import Driver, Field, SGDSettings, Step
from controlat.dynamics.recording import Recording
from controlat.dynamics.rollout import rollout
from controlat.dynamics.run_spec import RunSpec

__all__ = [
    "Driver",
    "Field",
    "Recording",
    "RunSpec",
    "SGDSettings",
    "Step",
    "pullback",
    "rollout",
    "state",
    "verify",
]
