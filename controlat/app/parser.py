"""The words of the command line: commands, flags, their help, and one line for every mistake."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any, NoReturn

from jsonargparse import (  # type: ignore[attr-defined]  # made by a function there
    ActionConfigFile,
    ArgumentParser,
    DefaultHelpFormatter,
    set_loader,
)

import controlat
from controlat._util.registry import meant
from controlat._util.texts import speaker
from controlat.app.ranges import RANGES, range_of
from controlat.app.settings import (
    AttackSettings,
    DeriveSettings,
    EvaluateSettings,
    SearchSettings,
    TrainSettings,
)
from controlat.app.settings_file import parse_yaml, read_settings
from controlat.pmp import controllers
from controlat.pmp.terminal import names as terminals

__all__ = ["LISTS", "Parser", "build_parser"]

set_loader("controlat", parse_yaml, (ValueError,))


def _whole(value: object) -> int:
    """A whole number of a list."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"expected a whole number, got {value!r}")
    return int(value)


_whole.__name__ = "int"  # what argparse calls it

LISTS: dict[str, Any] = {
    "schedules": str,
    "seeds": _whole,
    "attacks": str,
    "alphas": str | float,
    "knobs": str,
    "horizons": _whole,
    "spaces": str,
    "fidelity": str,
    "judge_seeds": _whole,
    "against": str,
    "x_range": str | float,
    "theta_range": str | float,
}


class Parser(ArgumentParser):
    """jsonargparse's parser, whose errors are one line."""

    reading = ""  # file and line of the setting that is being read

    def format_help(self, formatter: Any = None) -> str:
        """Flags are shown with dashes; with underscores they are taken too."""
        return re.sub(r"--\w+", lambda flag: dashed(flag[0]), super().format_help(formatter))

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """As jsonargparse's, which trips over numbers that no float can hold."""
        for flag, word in pairwise(["", *(args or ())]):
            name, _, value = word.rpartition("=")
            if re.fullmatch(r"[-+]?\d{101,}", value):
                self.error(f"{dashed(name or flag)} must be a number of at most 100 digits, got {len(value)}")
        return super().parse_args(args, *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the reason in one line and exit with 2."""
        words = [*getattr(self, "args", ()), ""]
        program = f"controlat {words[0]}" if self.prog == "controlat" and words[0] in _COMMANDS else self.prog
        reason = " ".join(f"{self.reading}{self._plain(str(message))}".split())
        print(f"controlat{speaker()}: error: {reason} (see {program} --help)", file=sys.stderr)
        raise SystemExit(2)

    def _plain(self, message: str) -> str:
        """A message of argparse's or jsonargparse's in the words of the command line."""
        message = re.sub(r'Parser key "(?:\w+\.)?(\w+)": expected', r"argument --\1: expected", message)
        if wrong := re.search(r'Parser key "(?:\w+\.)?(\w+)".*(?:Got|Given) value: (.*)', message, re.DOTALL):
            return f"{dashed(wrong[1])} must be {self._wanted(wrong[1])}, got {wrong[2]}"
        if missing := re.fullmatch(r"the following arguments are required: (?:\w+\.)?(\w+)", message):
            return f"{missing[1] if missing[1] == 'checkpoint' else dashed(missing[1])} is missing"
        if unknown := re.match(r"argument command: invalid choice: '(.*)' \(choose from (.*)\)", message):
            near = meant(unknown[1], _COMMANDS)
            return f"there is no command {unknown[1]!r}; {near}choose from {unknown[2]}"
        if unknown := re.match(r"unrecognized arguments: .*?(--[\w-]+)", message):
            near = meant(unknown[1], map(dashed, self._option_string_actions))
            message = f"{message}; {near}".rstrip("; ")
        return re.sub(r"(arguments?:? )(--\w+)", lambda m: m[1] + dashed(m[2]), message)

    def _wanted(self, name: str) -> str:
        """What a setting must be, by its range or type."""
        parser = self
        if self._subcommands_action is not None:  # the program's parser speaks for the command's
            parser = self._subcommands_action._name_parser_map[self.args[0]]
        (action,) = (a for a in parser._actions if a.dest == name)
        if (allowed := getattr(action, "allowed", None)) is not None:
            return str(allowed)
        kind: Any = getattr(action, "_typehint", action.type)
        words = {bool: "true or false", str: "a text", str | None: "a text"}
        return words.get(kind, "a mapping such as {name: value}")


def dashed(name: str) -> str:
    """A setting as its flag: --data-dir for data_dir."""
    return "--" + name.lstrip("-").replace("_", "-")


class _Help(DefaultHelpFormatter):
    """What may be given, and what it is if left out, behind each explanation."""

    def _get_help_string(self, action: Any) -> str:
        text = super()._get_help_string(action)
        if action.default is None:
            text = re.sub(r"(, )?default: %\(default\)s", "", text)
        if (allowed := getattr(action, "allowed", None)) is not None:
            text = text.replace("type: %(type)s", f"{allowed}")
        return text.replace("type: Union[", "type: ").replace(" ()", "")


class _SettingsFile(ActionConfigFile):
    """--config: a YAML file, read by `controlat.app.settings_file`; every mistake names file and line."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        content, lines = read_settings(values)
        known = {a.dest: a for a in parser._actions if a.dest not in ("help", "config", "print_config")}
        given: dict[str, str] = {}
        for key, value in content.items():
            parser.reading = f"{values}, line {lines[key]}: "
            name = key.replace("-", "_")
            if name not in known:
                near = meant(name, known) or f"there are {', '.join(sorted(known))}"
                parser.error(f"there is no setting {key!r}; {near.strip()}")
            if name in given:
                parser.error(f"{key} is given twice, first as {given[name]}")
            given[name] = key
            if known[name].nargs == "+" and not isinstance(value, list):
                value = [value]
            parsed = parser.parse_object({name: value}, env=False, defaults=False, _skip_validation=True)
            cfg[name] = parsed[name]
        parser.reading = ""  # and nothing is kept under "config": jsonargparse would read a path there itself


def _command(settings: type, description: str) -> Parser:
    """A parser of a command with one flag for each field of its settings."""
    parser = _parser(description)
    parser.add_argument("--config", action=_SettingsFile, help="YAML file of settings; flags override it.")
    known = {f.name: f for f in fields(settings)}
    lists = [name for name in LISTS if name in known]
    parser.add_class_arguments(settings, skip={*lists, "checkpoint"}, as_group=False)
    for name in lists:
        usual: Any = known[name].default
        default = list(usual) if usual else None
        help_ = _explained(settings, name)
        parser.add_argument(f"--{name}", nargs="+", type=LISTS[name], default=default, help=help_)
    for action in parser._actions:
        if action.dest in known:
            action.allowed = range_of(known[action.dest])  # type: ignore[attr-defined]
        if action.dest == "controller":
            known_ones = ", ".join(controllers.names())
            action.allowed = f"{known_ones}, or your own"  # type: ignore[attr-defined]
        if action.dest == "terminal":
            action.allowed = f"{', '.join(terminals())}, or a sum"  # type: ignore[attr-defined]
    return parser


def _explained(settings: type, name: str) -> str:
    """What the docstring of a class says about one of its fields."""
    entry = re.search(rf"^ {{8}}{name}: (.*(?:\n {{12}}.*)*)", settings.__doc__ or "", re.MULTILINE)
    assert entry is not None, name
    return " ".join(entry[1].split())


def _parser(description: str, **options: Any) -> Parser:
    return Parser(
        description=description,
        default_env=False,
        allow_abbrev=False,
        parser_mode="controlat",
        formatter_class=_Help,
        **options,
    )


def build_parser() -> Parser:
    """The parser of the program."""
    top = _parser(
        "Optimal-control analysis of adversarial training: how far is a schedule from optimal?",
        prog="controlat",
        version=controlat.__version__,
    )
    commands = top.add_subcommands(required=True, dest="command")
    for name, (make, help_) in _COMMANDS.items():
        parser = make()
        commands.add_subcommand(name, parser, help=help_)
        parser.prog = f"controlat {name}"
    return top


def _evaluate() -> Parser:
    parser = _command(EvaluateSettings, "Train under several schedules and compare C, robustness and cost.")
    parser.add_argument(
        "--out", type=str, required=True, help="Directory for results; with it alone: the demo."
    )
    parser.add_argument("--dry_run", action="store_true", help="Print evaluations and estimated time only.")
    return parser


def _train() -> Parser:
    parser = _command(TrainSettings, "Train one network under one schedule.")
    parser.add_argument("--out", type=str, required=True, help="Run directory: log, checkpoints, schedule.")
    parser.add_argument(
        "--resume", action="store_true", help="Go on with an interrupted run of these settings."
    )
    return parser


def _derive() -> Parser:
    parser = _command(DeriveSettings, "Derive a schedule from a landscape l(theta, x), and check it.")
    parser.add_argument(
        "--out", type=str, required=True, help="Directory for results; with it alone: Amata's landscape."
    )
    return parser


def _attack() -> Parser:
    parser = _command(AttackSettings, "Measure the robustness of a checkpoint.")
    parser.add_argument("checkpoint", type=str, help=_explained(AttackSettings, "checkpoint"))
    parser.add_argument("--out", type=str, default=None, help="JSON file to write.")
    return parser


def _data() -> Parser:
    parser = _parser("List the data sets, or download one.")
    parser.add_argument("name", nargs="?", default=None, help="Data set to download; lists them without it.")
    parser.add_argument("--data_dir", type=str, default=None, help="Where to; the cache if left out.")
    return parser


def _methods() -> Parser:
    parser = _parser("List the training systems, or describe one.")
    parser.add_argument("name", nargs="?", default=None, help="Describe this one: options and controls.")
    return parser


def _models() -> Parser:
    parser = _parser("List the networks.")
    classes = parser.add_argument("--num_classes", type=int, default=10, help="Number of classes.")
    classes.allowed = RANGES["num_classes"]
    return parser


def _search() -> Parser:
    parser = _command(SearchSettings, "Search for a schedule, and judge it under seeds of its own.")
    parser.add_argument(
        "--out", type=str, default=None, help="Directory for results; with it alone: the demo."
    )
    parser.add_argument(
        "--resume", type=str, default=None, help="Directory of a search: go on with the settings kept in it."
    )
    parser.add_argument("--dry_run", action="store_true", help="Print plan and estimated time only.")
    return parser


def _report() -> Parser:
    parser = _parser("Make summary.md and figures of an evaluation or a search again, from result.json.")
    parser.add_argument("directory", type=str, help="Directory that has a result.json.")
    return parser


_COMMANDS: dict[str, tuple[Callable[[], Parser], str]] = {
    "evaluate": (_evaluate, "compare schedules: criterion C, robustness, cost"),
    "search": (_search, "search for a schedule, judge what was found"),
    "report": (_report, "make summary and figures again from a result"),
    "train": (_train, "train under one schedule"),
    "derive": (_derive, "solve a landscape and make it a schedule"),
    "attack": (_attack, "robust accuracy of a checkpoint"),
    "data": (_data, "list the data sets, download one"),
    "methods": (_methods, "list the training systems with their controls"),
    "models": (_models, "list the networks with their parameters"),
}
