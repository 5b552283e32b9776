"""What an attack on one network found, as a table, in lines and as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlat._util import registry
from controlat._util.texts import count, table
from controlat.report import sections

__all__ = ["attack_figure", "attack_notes", "attack_table"]


def attack_table(result: Mapping[str, Any]) -> str:
    """The accuracies of one network under attack."""

    def row(name: str, accuracy: Mapping[str, Any]) -> list[str]:
        low, high = accuracy["interval"]
        return [name, str(accuracy["points"]), f"{accuracy['value']:.1%}", f"[{low:.1%}, {high:.1%}]"]

    cells = [row("clean", result["clean"])]
    cells += [row(f"after {name}", a) for name, a in result["after"].items()]
    cells.append(row("robust", result["robust"]))
    if "transfer" in result:
        cells += [row(f"transfer, {name}", a) for name, a in result["transfer"]["after"].items()]
    if "autoattack" in result:
        cells += [row(f"AutoAttack, after {name}", a) for name, a in result["autoattack"]["after"].items()]
    if "curves" in result:
        cells += [row(f"pgd-20, eps {a['eps']:.4g}", a) for a in result["curves"]["eps"]]
        cells += [row(f"pgd, {a['steps']} steps", a) for a in result["curves"]["steps"]]
    return table(["", "points", "accuracy", "95 % interval"], cells)


def attack_notes(result: Mapping[str, Any]) -> list[str]:
    """What else an attack on one network cost, and its warnings, in lines."""
    titles = {"masking": "Checks for gradient masking", "transfer": "Transfer", "curves": "Sweeps"}
    lines = []
    for name, title in (titles | {"autoattack": "AutoAttack"}).items():
        part = result.get(name, {})
        if part.get("gradients"):
            spent = (
                f"{count(part['gradients'])} gradient evaluations, {count(part['forwards'])} forward passes"
            )
            none = ": nothing found" if name == "masking" and not part["warnings"] else ""
            lines.append(f"{title}{none} ({spent}, {part['seconds']:.1f} seconds).")
    return lines + [f"WARNING: {text}." for text in result["warnings"]]


def attack_figure(result: Mapping[str, Any], path: Path) -> None:
    """Accuracy of one network against the radius and the steps, as the section on several shows it."""
    section = registry.member(sections.__name__, "curves")  # which imports matplotlib
    section.draw_networks([(result["schedule"] or "network", [result["curves"]])], result, path)
