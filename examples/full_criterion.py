"""Your own training, looked back upon: C over several horizons from exact costates, and what it is worth.

Run it as it is: python examples/full_criterion.py (ten seconds, on the bundled digits).
"""

import torch
from torch import nn

import controlat
from controlat.control.learning_rate import parse_rate
from controlat.data import load
from controlat.dynamics.driver import Driver, SGDSettings
from controlat.dynamics.recording import Recording
from controlat.dynamics.run_spec import RunSpec
from controlat.methods import build
from controlat.pmp import (
    AdversarialLoss,
    Candidates,
    Weighted,
    examine,
    trust,
)
from controlat.pmp.relaxed import relaxed

data = load("digits")
training, held_out = data.hold_out(256)
x, y = held_out.take(torch.arange(len(held_out)))
x_test, y_test = data.test.take(torch.arange(len(data.test)))

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))

ball, epochs = controlat.Ball(0.15), 6
schedule = controlat.parse_schedule("amata:min=1,max=5,tau=0.2", epochs)
spec = RunSpec(data=training, batch_size=64, epochs=epochs, controller=schedule, rate=parse_rate(0.02))
driver = Driver(model, build("pgd_at"), ball, SGDSettings(momentum=0.9))
recording = Recording.of(driver, spec)  # trains the model; every step of it can be visited again

phi = Weighted(((1.0, AdversarialLoss(x, y, ball)), (0.1, AdversarialLoss(x, y, ball, steps=0))))
candidates = Candidates.of((0.02, 0.05, 0.15), max_steps=6)
criterion = examine(recording, phi, candidates, gamma=0.001, horizons=[1, spec.batches_per_epoch], looks=2)
print(f"Phi = {phi.describe()}: {criterion.phi:.3f}")
for h in criterion.horizons:
    print(f"C = {criterion.value(h):.3f} with costates over {h} step{'s' * (h > 1)}")
best = criterion.best()
for b in best:
    better = f"better {b.maximiser}, worth {b.gain:.4f} of J to first order" if b.gain > 0 else "is best"
    print(f"epoch {b.index}: {b.control}, {better}")
if criterion.dropped:
    print(f"the costates leave out: {', '.join(criterion.dropped)}")

worth = trust(recording, criterion, phi)  # relaxed roll-outs, a part lambda of the way to these controls
print(f"J = {criterion.objective:.3f}, G = {worth.gain:.3f}, D = {worth.certificate:.3f}", end=", ")
print(", ".join(f"r({part:g}) = {worth.reliability(part):.2f}" for part in worth.outcomes))
if not worth.trusted:
    print("not trusted: a quarter of the way keeps less than a quarter of what G promises; go by D")

# One question of your own: half of the way, in the epoch where it promises most, and nowhere else.
b = max(best, key=lambda b: b.gain)
steps = range(b.index * spec.batches_per_epoch, (b.index + 1) * spec.batches_per_epoch)
there = relaxed(recording, dict.fromkeys(steps, b.maximiser), 0.5, phi).objective(criterion.price)
print(f"half of the way to {b.maximiser} in epoch {b.index} alone: J = {there:.3f}")

left = controlat.robustness(model, x_test, y_test, eps=0.15, attacks=["pgd-20", "cw-30"], checks=0).robust
print(f"the recorded network is as it was: robust {left}")
