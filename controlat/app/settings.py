"""Settings of the commands and of the Python calls: one dataclass each, checked at construction."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

from controlat._util.checks import brief, number, whole
from controlat._util.files import expanded
from controlat._util.registry import meant
from controlat._util.texts import short
from controlat.app.checkpoints import load_checkpoint
from controlat.app.ranges import RANGES, check_kinds, check_ranges
from controlat.attacks.balls import Ball
from controlat.control.learning_rate import Rate, parse_rate
from controlat.control.schedule_text import parse_schedule
from controlat.control.schedules import Schedule, load_schedule
from controlat.control.space import Knob
from controlat.data import Augment, augmentation, parse_augment
from controlat.dynamics.driver import SGDSettings
from controlat.methods import build
from controlat.pmp.candidates import MAXIMISERS
from controlat.pmp.terminal import parse_terminal
from controlat.records import (
    LogLine,
    Settings,
    checked,
    missing,
    read_epochs,
    read_record,
    settings_of,
)
from controlat.robust_accuracy import parse_attack
from controlat.robust_accuracy.auto import require as require_autoattack
from controlat.robust_accuracy.masking import CHECKS
from controlat.symbolic import AMATA
from controlat.symbolic.handover import MAPPINGS

__all__ = [
    "DEMO_EPS",
    "AttackSettings",
    "DeriveSettings",
    "EvaluateSettings",
    "TrainSettings",
    "checkpoint_of",
    "default_schedules",
    "read_schedule",
    "settings_from",
]

T = TypeVar("T", bound="Problem | AttackSettings | DeriveSettings")

DEMO_EPS = "0.15"
DEMO_LR, DEFAULT_LR = "onecycle:lr=0.2", 0.05
ATTACKS = ("fgsm", "pgd-20", "pgd-50-5", "cw-30", "cw-30-k50")

# What decides where and how fast a run happens, not what comes out of it on one device and thread count.
_RUNTIME = ("memory", "device", "threads", "progress", "tensorboard", "checkpoint_minutes", "data_dir")


def default_schedules(eps: str | float) -> tuple[str, ...]:
    """The schedules of the demo, with step sizes in proportion to eps: alpha K = 2 eps where K varies.

    >>> default_schedules("8/255")[1:4]
    ('fgsm:alpha=8/255', 'pgd:steps=10,alpha=2/255', 'amata:min=1,max=10,tau=16/255')
    >>> default_schedules(0.15)[2]
    'pgd:steps=10,alpha=0.0375'
    """
    one, quarter, twice = (_times(eps, factor) for factor in (Fraction(1), Fraction(1, 4), Fraction(2)))
    return (
        "none",
        f"fgsm:alpha={one}",
        f"pgd:steps=10,alpha={quarter}",
        f"amata:min=1,max=10,tau={twice}",
        f"exponential:min=1,max=10,tau={twice}",
        f"cosine:min=0,max=6,tau={twice}",
    )


def _times(eps: str | float, factor: Fraction) -> str:
    """A multiple of eps as one would write it: a fraction stays one."""
    if "/" not in str(eps):
        return f"{number(eps, 'eps') * factor:.12g}"
    found, below = Fraction(str(eps).strip()) * factor, str(eps).partition("/")[2].strip()
    whole = below.isdigit() and (found * int(below)).denominator == 1
    return f"{found * int(below)}/{below}" if whole else str(found)


def read_schedule(text: str, epochs: float, knobs: Mapping[str, Knob] | None = None) -> Schedule:
    """A schedule from its short text, or from a JSON file whose name ends in .json.

    Raises:
        ValueError: as `parse_schedule` and `load_schedule`.
    """
    path = expanded(text.strip())
    if os.path.isfile(path / "schedule.json"):  # False too for a text that is too long for a name
        raise ValueError(f"{text} is a directory; its schedule is {path / 'schedule.json'}")
    if path.suffix == ".json":
        return load_schedule(path)
    with warnings.catch_warnings():  # commands note what training never comes to, of files too
        warnings.simplefilter("ignore")
        return parse_schedule(text, epochs, knobs)


def settings_from(kind: type[T], given: Mapping[str, Any], command: str) -> T:
    """Settings from keyword arguments.

    Raises:
        ValueError: there is no setting of that name; or as the settings themselves.
    """
    names = [f.name for f in fields(kind) if f.name != "checkpoint" or "checkpoint" in given]
    for name in given:
        if name not in names:
            near = meant(name, names) or f"there are {', '.join(sorted(names))}"
            raise ValueError(f"{command} has no setting {name}; {near.strip()}")
    return kind(**given)


def _tidy(value: Any) -> Any:
    """0.3 and the text "0.3" are one setting; a fraction such as 8/255 stays as it was written."""
    with contextlib.suppress(ValueError):
        return float(value) if type(value) in (int, float, str) else value
    return value


@dataclass
class Problem:
    """What is trained on what, and how: shared by training and evaluation of schedules.

    Args:
        data: A data set (controlat data lists them), or your own package.module:factory returning a
            controlat.Dataset.
        data_dir: Folder of the data files; the cache that controlat data downloads to if left out.
        data_options: Options of the data set, such as {size: 64} for a folder of pictures; these are turned
            as their EXIF orientation says.
        augment: none, flip, crop:pad=4 or crop-flip:pad=4 in training; as is usual for the data if left out.
        model: A network (controlat models lists them), or your own package.module:factory returning an
            nn.Module.
        eps: Radius in pixel units of [0, 1], such as 0.3 or 8/255. 0.15 for digits in linf if left out.
        norm: linf or l2.
        method: Training system: a file of controlat/methods, or your own package.module:Class.
        method_options: Options of the method, such as {random_start: false}.
        epochs: Length of training T.
        batch_size: Samples per outer step.
        lr: 0.05, multistep:lr=0.1,at=50:75,factor=0.1 or onecycle:lr=0.2 (0.05, for digits onecycle:lr=0.2).
        momentum: Momentum mu of torch.optim.SGD.
        nesterov: Nesterov's form of momentum.
        weight_decay: Weight decay.
        train_points: Train on this many samples (a fixed subset); all if left out.
        test_points: Test on this many samples (a fixed subset); all if left out.
        held_out: Samples of the training set kept for validation; a tenth, at most 1000, if left out.
        bf16: Train in bfloat16 mixed precision. Evaluation and greedy criterion stay in float32.
        channels_last: Run convolutional networks in NHWC layout (faster).
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        threads: CPU threads; torch's default if left out.
        progress: Show progress bars (on a terminal).
    """

    data: str = "digits"
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    augment: str | None = None
    model: str = "mlp"
    eps: str | float | None = None
    norm: str = "linf"
    method: str = "pgd_at"
    method_options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 12
    batch_size: int = 64
    lr: str | float | None = None
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    train_points: int | None = None
    test_points: int | None = None
    held_out: int | None = None
    bf16: bool = False
    channels_last: bool = True
    device: str = "auto"
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        usual = augmentation(self.data)  # first of all: it says which data sets there are
        if self.augment is None:
            self.augment = usual
        Ball(0.0, self.norm)
        if self.eps is None:
            if (self.data, self.norm) != ("digits", "linf"):
                raise ValueError(
                    f"eps is missing: give the radius for {self.data} in {self.norm}, in pixel units, "
                    "such as 8/255"
                )
            self.eps = DEMO_EPS
        if self.lr is None:
            self.lr = DEMO_LR if self.data == "digits" else DEFAULT_LR
        self.eps, self.lr = _tidy(self.eps), _tidy(self.lr)
        if self.data_dir is not None:
            self.data_dir = str(expanded(self.data_dir).absolute())  # a run remembers it
        check_ranges(self, texts=("lr",))
        self.augmentation  # noqa: B018
        self.ball  # noqa: B018  (raises)
        self.sgd  # noqa: B018
        RANGES["lr"].check("lr", self.rate.lr)
        method = build(self.method, self.method_options)
        if hasattr(method, "check_ball"):
            method.check_ball(self.ball)

    @property
    def ball(self) -> Ball:
        """The perturbation set."""
        return Ball(number(self.eps, "eps"), self.norm)

    @property
    def augmentation(self) -> Augment | None:
        """The augmentation of training images."""
        return parse_augment(self.augment or "none")

    @property
    def rate(self) -> Rate:
        """The learning rate."""
        return parse_rate(DEFAULT_LR if self.lr is None else self.lr)

    @property
    def sgd(self) -> SGDSettings:
        """The optimiser."""
        return SGDSettings(self.momentum, self.nesterov, self.weight_decay)

    def to_json(self) -> dict[str, Any]:
        """What decides the results, as plain data."""
        found = {k: v for k, v in asdict(self).items() if k not in _RUNTIME}
        found["data_options"] = {k: v for k, v in self.data_options.items() if k != "workers"}
        return found

    def schedule_of(self, text: str) -> Schedule:
        """A schedule of this problem, checked against the method's controls.

        Raises:
            ValueError: it is malformed, or not admissible for the method.
        """
        known: dict[tuple[object, ...], Schedule] = self.__dict__.setdefault("_schedules", {})
        key = text, self.epochs, self.method, str(self.method_options)
        if key not in known:  # a file is read once, and may not change in the middle of a command
            space = build(self.method, self.method_options).controls
            schedule = read_schedule(text, self.epochs, space)
            try:
                known[key] = schedule.bound(space)
            except ValueError as error:
                raise ValueError(f"schedule {short(text)!r}: {error}") from None
        return known[key]

    def controller_of(self, given: str | os.PathLike[str] | Schedule | Callable[..., Any]) -> Any:
        """A controller of this problem: a text or file as `schedule_of`, a schedule bound to the method's
        controls, any other as it is.

        Raises:
            ValueError: a schedule is malformed, or not admissible for the method.
        """
        if isinstance(given, (str, os.PathLike)):
            return self.schedule_of(os.fspath(given))
        if isinstance(given, Schedule):
            return given.bound(build(self.method, self.method_options).controls)
        if not callable(given):
            raise ValueError(f"schedule must be a short text, JSON file or controller, got {brief(given)}")
        return given


@dataclass
class TrainSettings(Problem):
    """Train one network under one schedule.

    Args:
        schedule: Short text such as amata:min=2,max=10,tau=20/255, or a JSON file. amata from 1 to 10 steps
            with tau = 2 eps if left out.
        seed: Of initial weights, order of samples and random starts.
        checkpoint_minutes: Longest time between two checkpoints within an epoch.
        tensorboard: Write TensorBoard event files too.
    """

    schedule: str | None = None
    seed: int = 0
    checkpoint_minutes: float = 10.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule is None:
            self.schedule = default_schedules(self.eps or 0)[3]
        self.planned  # noqa: B018  (raises)
        self.seed = whole(self.seed, "seed")

    @property
    def planned(self) -> Schedule:
        """The schedule."""
        assert self.schedule is not None
        return self.schedule_of(self.schedule)

    def to_json(self) -> dict[str, Any]:
        """What decides the results; the schedule in full, so that an edited file is noticed."""
        return super().to_json() | {"schedule": self.planned.to_json()}


@dataclass
class EvaluateSettings(Problem):
    """Train under several schedules and compare: criterion C, robustness, cost.

    Args:
        schedules: Short texts or JSON files; six of the demo, scaled to eps, for digits if left out.
        seeds: One run of every schedule for each; 0 if left out (0 1 2 for digits).
        gamma: Price of one gradient evaluation per sample, in units of the squared gradient norm.
        maximiser: sweep (exact in K for each step size) or tpe (hyperopt over alpha and K, as in the paper).
        trials: Evaluations of tpe at each instant.
        probe: Training samples that the criterion is computed on.
        alphas: Step sizes of G; five spaced logarithmically in [eps/40, 2 eps] if left out.
        max_steps: Largest K of G; the largest of the schedules compared if left out.
        terminal: Terminal cost Phi on held-out samples: adversarial, margin, clean, a sum such as
            adversarial+0.1*clean, or your own package.module:factory of (x, y, ball, seed) returning a
            controlat.pmp.Terminal.
        attacks: Evaluation attacks: fgsm, pgd-20, pgd-50-10 (restarts), cw-30, cw-30-k50.
        autoattack: AutoAttack on this many test points too; 0 for none (pyautoattack; its cost is printed).
        surrogate: Checkpoint of a network trained independently, for transfer attacks.
        sweeps: Sweep over eps and over steps too, with a figure.
        checks: Points that every evaluation checks for gradient masking.
        full: Compute the full criterion too, over several horizons and calibrated; rolls every run out again.
        horizons: Horizons of the full criterion in steps; 1, an epoch and the whole run if left out.
        looks: Steps of every epoch (or shorter stretch of one control) that the full criterion looks at.
        memory: GiB that states of a recorded roll-out may take; with less, more steps are taken again.
        run: Directory of a finished controlat train: its problem, schedule and seed are evaluated, and the
            network is compared with its own. Takes the place of the settings that are named there.
    """

    schedules: Sequence[str] = ()
    seeds: Sequence[int] = ()
    gamma: str | float = "0.04"
    maximiser: str = "sweep"
    trials: int = 100
    probe: int = 512
    alphas: Sequence[str | float] | None = None
    max_steps: int | None = None
    terminal: str = "adversarial"
    attacks: Sequence[str] = ATTACKS
    autoattack: int = 0
    surrogate: str | None = None
    sweeps: bool = False
    checks: int = CHECKS
    full: bool = True
    horizons: Sequence[int] | None = None
    looks: int = 2
    memory: float = 4.0
    run: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if self.run is not None:
            self.run = str(expanded(self.run))
            self._take(Path(self.run))
        super().__post_init__()
        if not self.schedules:
            if self.data != "digits":
                raise ValueError(
                    "schedules are missing: give one or more, such as none amata:min=2,max=10,tau=20/255"
                )
            self.schedules = default_schedules(self.eps or 0)
        if not isinstance(self.seeds, Sequence) or isinstance(self.seeds, str):
            raise ValueError(f"seeds must be a list of whole numbers, got {brief(self.seeds)}")
        seeds = tuple(whole(seed, "a seed") for seed in self.seeds)
        self.seeds = seeds or ((0, 1, 2) if self.data == "digits" else (0,))
        for name in ("schedules", "seeds", "attacks"):
            values = list(getattr(self, name))
            setattr(self, name, values)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different ones, got {values}")
        for text in self.schedules:
            self.schedule_of(text)
        _check_evaluation(self)
        self.gamma = _tidy(self.gamma)
        if self.maximiser not in MAXIMISERS:
            raise ValueError(f"maximiser must be one of {', '.join(MAXIMISERS)}, got {self.maximiser!r}")
        parse_terminal(self.terminal)
        if self.alphas is not None:
            self.alphas = [number(a, "alphas") for a in self.alphas]

    def _take(self, run: Path) -> None:
        """The problem, schedule and seed of a finished run; settings that say otherwise are refused."""
        found = _check_run(run)
        if self.data_dir is None:
            self.data_dir = load_checkpoint(run / "last.pt")["settings"].get("data_dir")
        theirs = {f.name: found[f.name] for f in fields(Problem) if f.name in found}
        theirs |= {"schedules": [str(run / "schedule.json")], "seeds": [found["seed"]]}
        for f in fields(self):
            if f.name not in theirs:
                continue
            mine, default = (
                getattr(self, f.name),
                f.default_factory() if callable(f.default_factory) else f.default,
            )
            if _plain(mine) not in (_plain(default), _plain(theirs[f.name])):
                raise ValueError(
                    f"{f.name} {mine} contradicts {run}, which has {theirs[f.name]}: leave it "
                    "out, or evaluate without --run"
                )
            setattr(self, f.name, theirs[f.name])

    def to_json(self) -> dict[str, Any]:
        """What decides the results; schedules in full."""
        return super().to_json() | {"schedules": [self.schedule_of(t).to_json() for t in self.schedules]}


def _plain(value: Any) -> Any:
    """A setting as it is compared: numbers by value, sequences as lists."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return number(value, "")
    return list(value) if isinstance(value, (list, tuple)) else value


@dataclass
class AttackSettings:
    """Measure the robustness of a checkpoint.

    Args:
        checkpoint: A run directory, for its best.pt, or else its last.pt; or one of these files.
        attacks: Evaluation attacks: fgsm, pgd-20, pgd-50-10 (restarts), cw-30, cw-30-k50.
        autoattack: AutoAttack on this many test points too; 0 for none (pyautoattack; its cost is printed).
        surrogate: Checkpoint of a network trained independently, for transfer attacks.
        sweeps: Sweep over eps and over steps too; with --out FILE.json the figure is FILE.png.
        checks: Points that are checked for gradient masking.
        eps: Radius; that of training if left out.
        norm: linf or l2; that of training if left out.
        points: Test on this many samples (a fixed subset); as many as the run if left out.
        data_dir: Folder of the data files.
        seed: Of the random starts.
        batch_size: Samples at a time.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        threads: CPU threads; torch's default if left out.
        progress: Show a progress bar (on a terminal).
    """

    checkpoint: str
    attacks: Sequence[str] = ATTACKS
    autoattack: int = 0
    surrogate: str | None = None
    sweeps: bool = False
    checks: int = CHECKS
    eps: str | float | None = None
    norm: str | None = None
    points: int | None = None
    data_dir: str | None = None
    seed: int = 0
    batch_size: int = 256
    device: str = "auto"
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        self.checkpoint = str(checkpoint_of(self.checkpoint))
        if self.data_dir is not None:
            self.data_dir = str(expanded(self.data_dir).absolute())
        check_ranges(self)
        _check_evaluation(self)
        self.seed = whole(self.seed, "seed")
        # The norm may be that of training, which is not known here: that of the wider bound stands for it.
        Ball(0.0 if self.eps is None else number(self.eps, "eps"), self.norm or "l2")


@dataclass
class DeriveSettings:
    """Derive a schedule from a one-dimensional landscape l(theta, x), and check it.

    Args:
        landscape: Formula in theta, x and named parameters, such as theta^2/2 - (x - theta)^2/(theta^2 + 1),
            which is Amata's and the default. One that begins with a minus sign: --landscape=-theta...
        parameters: Values of the named parameters, such as {a: 2}.
        x0: Data point, where the inner ascent starts.
        theta0: theta at t = 0; with --calibrate it says on which side of the minimum to look.
        tau: Product alpha K of the landscape, held fixed.
        horizon: Length T of training in the landscape's time, theta' = -dL/dtheta.
        gamma: Price of one inner step per unit of that time.
        order: Highest power of t in the Taylor series of K*.
        branch: Which inner maximum at theta0, by value (0 is the largest), where there are several; the
            largest, if the ascent from x0 reaches it, if left out.
        x_range: Where inner maxima are looked for; 10 to either side of x0 if left out.
        theta_range: How far the inner maximum is followed; +-max(3, 2 |theta0|) if left out.
        admissible: product (alpha K = tau, alpha <= alpha*), integer (K whole), free (alpha and K),
            overshoot (alpha up to a multiple of alpha*).
        overshoot: That multiple, between 1 and 2.
        checks: Check the schedule against the maximum principle, by transcription and by dynamic programming,
            and compare Theorem 1 with actual runs.
        seconds: Time limit of the whole derivation, after the measuring of --calibrate and before figures:
            formulas get half of it, checks the rest; what was left out for lack of time is named. The numbers
            alone may take 10 seconds in any case.
        epochs: Length of the network's training; 12, or that of the run with --calibrate, if left out.
        k_min: Smallest K of the network's schedule.
        k_max: Largest K of the network's schedule.
        tau_net: alpha K of the network in pixel units; 0.3, or 2 eps of the run, if left out.
        mapping: affine (the range of K* is stretched to k_min..k_max) or clip (K* itself, cut off there);
            clip with --calibrate, which knows K* in steps of the network, else affine.
        resolution: Length of a piece of the network's schedule, in epochs.
        calibrate: Directory of a finished controlat train: theta0, scale of time and tau are fitted to it.
        measure: What is fitted: convergence (inner steps needed) or curvature (of the loss along the ascent).
        since: Fit from this epoch of the run on; from where the measure is lowest if left out.
        data_dir: Folder of the run's data files; where the run had them if left out.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps; for --calibrate.
        threads: CPU threads; those of the run if left out.
        progress: Show a progress bar (on a terminal).
    """

    landscape: str = AMATA
    parameters: dict[str, Any] = field(default_factory=dict)
    x0: str | float = 0
    theta0: str | float = 1
    tau: str | float = 10
    horizon: str | float = 3
    gamma: str | float = "0.01"
    order: int = 2
    branch: int | None = None
    x_range: Sequence[str | float] | None = None
    theta_range: Sequence[str | float] | None = None
    admissible: str = "product"
    overshoot: float = 1.9
    checks: bool = True
    seconds: float = 60.0
    epochs: int | None = None
    k_min: float = 1
    k_max: float = 10
    tau_net: str | float | None = None
    mapping: str | None = None
    resolution: float = 1.0
    calibrate: str | None = None
    measure: str = "convergence"
    since: float | None = None
    data_dir: str | None = None
    device: str = "auto"
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("x_range", "theta_range"):
            given = getattr(self, name)
            if given is not None:
                if len(given) != 2:
                    raise ValueError(f"{name} must be two numbers, got {given}")
                setattr(self, name, [number(v, name) for v in given])
        check_ranges(self)
        if self.resolution > (self.epochs or math.inf):
            raise ValueError(f"resolution must be at most the {self.epochs} epochs, got {self.resolution:g}")
        if self.data_dir is not None:
            self.data_dir = str(expanded(self.data_dir).absolute())
        if self.calibrate is not None:
            self.calibrate = str(expanded(self.calibrate))
            _check_run(Path(self.calibrate))
            for name in ("tau", "horizon"):
                default = type(self).__dataclass_fields__[name].default
                if number(getattr(self, name), name) != number(default, name):
                    raise ValueError(f"{name} is fitted to the run with calibrate: leave it out")
        if self.mapping is None:
            self.mapping = "affine" if self.calibrate is None else "clip"
        if self.mapping not in MAPPINGS:
            raise ValueError(f"mapping must be one of {', '.join(MAPPINGS)}, got {self.mapping!r}")
        if self.k_min > self.k_max:
            raise ValueError(f"K needs k_min <= k_max, got {self.k_min:g} and {self.k_max:g}")
        if self.measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {self.measure!r}")
        from controlat.symbolic.bolza import SETS  # here, because sympy is slow to import

        if self.admissible not in SETS:
            raise ValueError(f"admissible must be one of {', '.join(SETS)}, got {self.admissible!r}")
        self.task  # noqa: B018  (raises)

    @property
    def task(self) -> Any:  # named in full, the type would be imported, and sympy, when any command starts
        """The problem on the landscape, a `controlat.symbolic.Task`."""
        from controlat.symbolic import Landscape, Task

        x_range, theta_range = (
            None if r is None else (number(r[0], "range"), number(r[1], "range"))
            for r in (self.x_range, self.theta_range)
        )
        return Task(
            Landscape(self.landscape, self.x0, self.parameters, x_range),
            self.theta0,
            self.tau,
            self.horizon,
            self.gamma,
            self.order,
            self.branch,
            theta_range,
            self.seconds / 2 if self.checks else self.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """What decides the results, as plain data."""
        return {k: v for k, v in asdict(self).items() if k not in _RUNTIME}


MEASURES = ("convergence", "curvature")


def _check_run(run: Path) -> dict[str, Any]:
    """The settings of a finished `controlat train`; an error says what the directory is instead."""
    if not (run / "settings.json").exists():
        raise ValueError(f"{run} is not the directory of a controlat train: it has no settings.json")
    found: dict[str, Any] = read_record(run / "settings.json", Settings)
    if found.get("command") != "train":
        raise ValueError(f"{run} is not the directory of a controlat train")
    from_json(TrainSettings, found, str(run / "settings.json"))
    if lost := missing(read_epochs(run / "log.jsonl", LogLine), found["epochs"]):
        told = f"{found['epochs'] - len(lost)} of {found['epochs']} epochs"
        raise ValueError(f"{run} has {told}; finish it with --resume (epoch {lost[0]} is not in log.jsonl)")
    return found


def _check_evaluation(settings: EvaluateSettings | AttackSettings) -> None:
    """Refuse what no evaluation can do, before anything long begins."""
    for attack in settings.attacks:
        parse_attack(attack)
    if settings.autoattack:
        require_autoattack()
    if settings.surrogate is not None:
        settings.surrogate = str(checkpoint_of(settings.surrogate))


def checkpoint_of(path: str | Path) -> Path:
    """A checkpoint by its name, or by that of its run directory: the best one, or else the last."""
    found = expanded(path)
    if not found.is_dir():
        return found
    for name in ("best.pt", "last.pt"):
        if (found / name).is_file():
            return found / name
    raise ValueError(f"{path}: no such checkpoint; the directory has neither best.pt nor last.pt")


def from_json(kind: type[Problem], found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments for the fields of `Problem` that stored settings of this kind hold.

    Raises:
        ValueError: one is of the wrong type or out of range; the message begins with `where` it is from.
    """
    checked(found, settings_of(kind), where)
    problem = {f.name: found[f.name] for f in fields(Problem) if f.name in found}
    try:
        Problem(**problem)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return problem
