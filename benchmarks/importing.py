"""Seconds that importing controlat takes beyond importing torch, each time in a process of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

from _common import RESULTS, environment, main, positive, progress, table

TARGET = 0.3  # seconds beyond torch until an attack can be called

WAYS = {
    "an attack": "controlat.pgd",
    "robust accuracy": "controlat.robustness",
    "the criterion": "controlat.criterion",
    "the command line": "from controlat.app.parser import build_parser; build_parser()",
}

PROGRAM = """
import time
import torch
began = time.perf_counter()
import controlat
{}
print(time.perf_counter() - began)
"""


def seconds(way: str) -> float:
    """One start."""
    command = [sys.executable, "-c", PROGRAM.format(way)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The whole result, as it is written."""
    rows: list[dict[str, Any]] = []
    for name, way in WAYS.items():
        progress(name)
        rows.append({"for": name, "seconds": min(seconds(way) for _ in range(args.repeats))})
    return {
        "benchmark": "importing",
        "environment": environment(),
        "settings": {"repeats": args.repeats},
        "target": TARGET,
        "rows": rows,
        "met": rows[0]["seconds"] <= TARGET,
    }


def show(found: dict[str, Any]) -> str:
    """The result as a table."""
    cells = [(row["for"], f"{row['seconds']:.3f}") for row in found["rows"]]
    return (
        f"{found['environment']['cpu']}, minimum of {found['settings']['repeats']} processes\n\n"
        f"{table(('for', 'seconds beyond torch'), cells)}\n\n"
        f"target: an attack at most {TARGET} s: {'met' if found['met'] else 'MISSED'}"
    )


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--out", metavar="FILE", default=RESULTS / "importing.json", help="JSON result")
    made.add_argument("--repeats", metavar="N", type=positive, default=5, help="processes for each row")
    made.add_argument("--check", action="store_true", help="exit with status 1 when the target is missed")
    return made


if __name__ == "__main__":
    sys.exit(main(arguments(), measure, show))
