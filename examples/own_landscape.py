"""A schedule derived from a landscape of your own, checked, and run on a network.

Run it as it is: python examples/own_landscape.py (half a minute, on the bundled digits).
"""

import tempfile
from pathlib import Path

import controlat

if __name__ == "__main__":
    out = Path(tempfile.mkdtemp())
    found = controlat.derive(
        "a*theta^2/2 - (x - theta)^2/(theta^4 + 1)",  # the loss of a parameter theta and an input x
        parameters={"a": "1/2"},
        **{"theta0": "3/2", "tau": 10, "horizon": 4, "gamma": 0.01},  # of the landscape
        **{"epochs": 6, "k_min": 1, "k_max": 6, "tau_net": 0.3},  # of the network
        out=out / "derived",
    )
    print(found)  # x*, alpha*, theta(t), K*(t), and how far the checks bear them out
    schedule = str(out / "derived" / "schedule.json")  # or found.schedule(epoch) in your own loop
    trained = controlat.train(out / "run", schedule=schedule, epochs=6, threads=1)
    print(f"robust (PGD-10, held out) {trained['epochs'][-1]['robust']:.1%}")
