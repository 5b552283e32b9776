"""What the benchmarks share: a fitted LeNet with images, the environment record, tables, results."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlat._util import rng
from controlat._util.files import write_json
from controlat.data import Dataset, Samples, Split
from controlat.data import load as load_data
from controlat.models import build

RESULTS = Path(__file__).parent / "results"
CLASSES, SIDE = 10, 28
VARIABLES = ("MALLOC_", "LD_PRELOAD", "OMP_", "MKL_", "ONEDNN_", "DNNL_")  # environment that changes speed
LEARNT = 0.5  # accuracy that a fitted network must have


class Problem(NamedTuple):
    """A fitted network and the data that it is attacked on."""

    model: nn.Module
    data: Dataset
    record: dict[str, Any]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser(description: str | None, out: str, repeats: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--mnist", metavar="DIR", help="folder of MNIST; synthetic images if not given")
    made.add_argument("--out", metavar="FILE", type=Path, default=RESULTS / out, help="JSON result")
    made.add_argument("--repeats", metavar="N", type=positive, default=repeats, help="timed rounds")
    made.add_argument("--threads", metavar="N", type=positive, default=1, help="threads of torch")
    made.add_argument("--seed", type=int, default=0, help="of the network, the images and the random start")
    made.add_argument("--fit-steps", metavar="N", type=positive, default=100, help="SGD steps beforehand")
    made.add_argument("--check", action="store_true", help="exit with status 1 when the target is missed")
    return made


def _images(labels: Tensor, templates: Tensor, generator: torch.Generator) -> Tensor:
    """Bright blobs on black, as in MNIST: the shifted template of the class, a fainter one of another, noise.

    Shifts are of up to 3 pixels; the fainter template makes the classes overlap.
    """
    n = len(labels)
    shifts = torch.randint(-3, 4, (n, 2), generator=generator).tolist()
    own = [templates[c].roll(s, (-2, -1)) for c, s in zip(labels.tolist(), shifts, strict=True)]
    other = templates[torch.randint(CLASSES, (n,), generator=generator)]
    share = 0.9 * torch.rand(n, 1, 1, 1, generator=generator)
    x = torch.maximum(torch.stack(own), share * other)
    return x * (0.5 + 0.5 * torch.rand(x.shape, generator=generator))


def synthetic(seed: int, train: int = 4096, test: int = 1024) -> Dataset:
    """Class-dependent images of MNIST's shape, so that everybody can run the benchmark."""
    generator = rng.generator(seed, "synthetic")
    coarse = torch.randn(CLASSES, 1, 7, 7, generator=generator)
    templates = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear").sub(0.5).clamp(0, 1)
    labels = [torch.arange(n) % CLASSES for n in (train, test)]
    first, second = (Split(_images(y, templates, generator), y) for y in labels)
    return Dataset("synthetic", first, second, CLASSES)


def fit(model: nn.Module, data: Samples, steps: int, seed: int, batch: int = 128) -> None:
    """Some steps of SGD on clean images, so that gradients are not those of a random network."""
    generator = rng.generator(seed, "fit")
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for _ in range(steps):
        x, y = data.take(torch.randint(len(data), (batch,), generator=generator))
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    sgd.zero_grad()
    model.eval()


def fitted(args: argparse.Namespace, name: str = "lenet") -> Problem:
    """A network of controlat.models after `args.fit_steps` steps, in evaluation mode.

    Raises:
        ValueError: the folder of MNIST lacks a file; or the network learnt nothing, so that its gradients are
            no example of anything.
    """
    if args.mnist and not Path(args.mnist).is_dir():
        raise ValueError(f"--mnist {args.mnist}: no such folder; leave it out for synthetic images")
    torch.set_num_threads(args.threads)
    data = load_data("mnist", args.mnist) if args.mnist else synthetic(args.seed)
    with rng.scoped(args.seed, "model"):
        model = build(name, data.in_shape, data.num_classes)
    fit(model, data.train, args.fit_steps, args.seed)
    x, y = data.test.take(torch.arange(min(1000, len(data.test))))
    with torch.no_grad():
        logits = model(x)
    accuracy = float((logits.argmax(1) == y).float().mean())
    if accuracy < LEARNT:
        raise ValueError(
            f"the network's accuracy is {accuracy:.1%} after {args.fit_steps} steps, it must be at least "
            f"{LEARNT:.0%}: give more --fit-steps or another --seed"
        )
    record = {
        "model": name,
        "data": data.name,
        "fit_steps": args.fit_steps,
        "clean_loss": float(F.cross_entropy(logits, y)),
        "clean_accuracy": accuracy,
        "seed": args.seed,
    }
    return Problem(model, data, record)


def _cpu() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Where and how a result was made: versions, processor, threads, date, command line."""
    packages = ("torch", "torchattacks", "foolbox", "controlat")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)},
    }


def progress(text: str) -> None:
    """Overwrite the progress line on stderr; an empty text clears it."""
    sys.stderr.write(f"\r\x1b[K{text}" if sys.stderr.isatty() else f"{text}\n" if text else "")
    sys.stderr.flush()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first to the left, the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = (c.rjust(w) for c, w in zip(cells, widths, strict=True))
        return "  ".join([first.strip().ljust(widths[0]), *others])

    return "\n".join(map(line, lines))


def heading(found: Mapping[str, Any]) -> str:
    """Two lines that say on what a table was measured."""
    where, on = found["environment"], found["problem"]
    packages = ", ".join(f"{name} {v}" for name, v in where["versions"].items() if v)
    return (
        f"{where['cpu']}, {where['threads']} thread(s), Python {where['python']}, {packages}\n"
        f"{on['model']} after {on['fit_steps']} steps on {on['data']}: "
        f"clean loss {on['clean_loss']:.3f}, accuracy {on['clean_accuracy']:.1%}"
    )


def main(
    arguments: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], str],
) -> int:
    """Parse, measure, print and write; user mistakes end with one line instead of a trace."""
    args = arguments.parse_args()
    try:
        found = measure(args)
        progress("")
        write_json(args.out, found)
    except (ValueError, OSError) as error:
        progress("")
        arguments.error(str(error))
    print(show(found))
    print(f"\nwritten to {args.out}")
    return int(args.check and not found["met"])
