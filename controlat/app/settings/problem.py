"""What is trained on what, and how: the settings that training and evaluation share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from controlat._util.checks import choice, number
from controlat._util.files import expanded
from controlat._util.registry import call_factory, meant
from controlat._util.texts import short
from controlat.app.placement import TF32_CHOICES
from controlat.app.ranges import RANGES, check_kinds, check_ranges
from controlat.app.settings.objects import named_data, named_method, named_model
from controlat.app.settings.schedules import names_controller, names_factory, read_schedule
from controlat.attacks.balls import Ball
from controlat.control.controller import Controller, as_controller
from controlat.control.learning_rate import Rate, parse_rate
from controlat.control.schedules import Schedule
from controlat.data import Augment, augmentation, parse_augment
from controlat.data import load as load_data
from controlat.dynamics.driver import SGDSettings
from controlat.methods import build
from controlat.models.frozen import graph_use
from controlat.pmp import controllers
from controlat.records import checked, settings_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["DEMO_EPS", "OBJECTS", "RUNTIME", "Problem", "from_json", "settings_from", "tidy"]

DEMO_EPS = "0.15"
DEMO_LR, DEFAULT_LR = "onecycle:lr=0.2", 0.05

OBJECTS = ("data", "method", "model")  # settings that from Python may be objects

# What decides where and how fast a run happens, not what comes out of it on one device and thread count.
RUNTIME = (
    *("memory", "device", "threads", "jobs", "cuda_graphs", "progress", "tensorboard"),
    *("checkpoint_minutes", "data_dir", "engine", "address"),
)

T = TypeVar("T", bound="DataclassInstance")


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


def from_json(kind: type[Problem], stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Keyword arguments for the fields of `Problem` that stored settings of this kind hold.

    Raises:
        ValueError: one is of the wrong type or out of range; the message begins with `where` it is from.
    """
    checked(stored, settings_of(kind), where)
    problem = {f.name: stored[f.name] for f in fields(Problem) if f.name in stored}
    try:
        Problem(**problem)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return problem


def tidy(value: Any) -> Any:
    """0.3 and the text "0.3" are one setting; a fraction such as 8/255 stays as it was written."""
    with contextlib.suppress(ValueError):
        return float(value) if type(value) in (int, float, str) else value
    return value


@dataclass
class Problem:
    """What is trained on what, and how: shared by training and evaluation of schedules.

    From Python, data, model and method may be objects too (`controlat.app.settings.objects`).

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
        held_out: Samples of the training set that are held out: half of them, at most 256, for Phi, the rest
            for validation and all else that is decided in training; a tenth, at most 1000, if left out.
        bf16: Train in bfloat16 mixed precision. Evaluation, costates and criterion stay in float32.
        tf32: auto, on or off: whether training on a GPU rounds products of float32 numbers to TF32; auto
            leaves it to torch (convolutions yes, matrix products no). Evaluation and criterion never do.
        channels_last: Run convolutional networks in NHWC layout (faster).
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, mps.
        threads: CPU threads; if left out, those of the run that is resumed, else OMP_NUM_THREADS, else as
            many as suit the network: 1 for small ones.
        cuda_graphs: auto (on a CUDA device, inner ascents as CUDA graphs where the network can be captured)
            or off.
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
    tf32: str = "auto"
    channels_last: bool = True
    device: str = "auto"
    threads: int | None = None
    cuda_graphs: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self, OBJECTS)
        for name in OBJECTS:
            self.name_object(name)
        choice(self.cuda_graphs, "cuda_graphs", graph_use.MODES)
        usual = augmentation(self.data)  # first of all: it says which data sets there are
        if self.augment is None:
            self.augment = usual
        Ball(0.0, self.norm)
        choice(self.tf32, "tf32", TF32_CHOICES)
        if self.eps is None:
            if (self.data, self.norm) != ("digits", "linf"):
                raise ValueError(
                    f"eps is missing: give the radius for {self.data} in {self.norm}, in pixel units, "
                    "such as 8/255"
                )
            self.eps = DEMO_EPS
        if self.lr is None:
            self.lr = DEMO_LR if self.data == "digits" else DEFAULT_LR
        self.eps, self.lr = tidy(self.eps), tidy(self.lr)
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

    def name_object(self, name: str) -> None:
        """Put a name in the place of an object that was given as one of `OBJECTS`."""
        if name == "model":
            self.model = named_model(self.model, self._form)
        else:
            setattr(self, name, {"data": named_data, "method": named_method}[name](getattr(self, name)))

    def _form(self) -> tuple[tuple[int, int, int], int]:
        """Shape of the images, and number of classes."""
        data = load_data(self.data, self.data_dir, **self.data_options)
        return data.in_shape, data.num_classes

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
        plain = {k: v for k, v in asdict(self).items() if k not in RUNTIME}
        plain |= {name: str(plain[name]) for name in OBJECTS}
        plain["data_options"] = {k: v for k, v in self.data_options.items() if k != "workers"}
        if self.tf32 == "auto":  # runs of before, which have no such line, go on
            del plain["tf32"]
        return plain

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

    def controller_of(self, given: str | os.PathLike[str] | Controller | Callable[..., Any]) -> Controller:
        """A controller of this problem: a schedule, a closed loop by its text or the user's own by its name
        (made anew), or one that is there already.

        Raises:
            ValueError: it is malformed, not admissible or no controller, or its factory cannot be called.
        """
        method = build(self.method, self.method_options)
        if isinstance(given, Schedule):
            return given.bound(method.controls)
        if not isinstance(given, (str, os.PathLike)):
            return self._controller(given, "schedule must be a short text, JSON file or controller")
        text = os.fspath(given)
        if not names_controller(text):
            return self.schedule_of(text)
        if not names_factory(text):
            return controllers.build(text, method=method, ball=self.ball)
        offered = {"epochs": self.epochs, "ball": self.ball, "controls": method.controls}
        made = call_factory(text, offered)
        return self._controller(made, f"{text!r} makes no controller")

    @staticmethod
    def _controller(made: Any, what: str) -> Controller:
        try:
            return as_controller(made)
        except TypeError as error:
            raise ValueError(f"{what}: {error}") from None
