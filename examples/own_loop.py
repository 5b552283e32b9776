"""Your own model and your own loop under an Amata schedule, with the criterion C at every epoch.

Run it as it is: python examples/own_loop.py (a minute at most, on the bundled digits).
"""

import torch
from torch import nn

import controlat
from controlat.data import load

data = load("digits")
x, y = data.train.take(torch.arange(len(data.train)))
x_test, y_test = data.test.take(torch.arange(len(data.test)))

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 6 * 6, 10))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

eps, epochs = 0.15, 6
schedule = controlat.parse_schedule("amata:min=1,max=8,tau=0.3", epochs)  # or controlat.load_schedule(path)

for epoch in range(epochs):
    batches = torch.randperm(len(x)).split(64)
    u = schedule.at(epoch, 0, len(batches))  # {'alpha': ..., 'steps': ...}
    gap = controlat.criterion(model, x[:512], y[:512], u, eps=eps, gamma=0.04, optimizer=optimizer)
    print(f"epoch {epoch}: {gap}")
    for batch, i in enumerate(batches):
        x_adv = controlat.pgd(model, x[i], y[i], eps=eps, **schedule.at(epoch, batch, len(batches)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_adv), y[i]).backward()
        optimizer.step()

found = controlat.robustness(model, x_test, y_test, eps=eps, attacks=["fgsm", "pgd-20", "pgd-50-5", "cw-30"])
print(f"clean {found.clean}, robust {found.robust}, {found.clean.points} points")
