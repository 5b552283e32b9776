"""In which sense is Amata's derived schedule the best? The cases behind the text of analysis/mathematics.md.

    python analysis/landscape_checks.py [--out DIR]    # 15 seconds on a core

On the landscape of Ye et al. (2021), equation 11: dynamic programming beside the maximum principle for sixty
problems, the prices up to which the principle holds, the four admissible sets, other step sizes at gamma = 0,
and Theorem 1 beside actual runs. Results go to analysis/landscape_checks: result.json (all numbers) and
table.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy.integrate import solve_ivp

from controlat._util.files import write_json, write_text
from controlat._util.texts import table
from controlat.app.runs import environment
from controlat.bolza import convergence
from controlat.bolza.admissible import SETS
from controlat.bolza.path import derived_path
from controlat.bolza.principle import criterion, gamma_limit
from controlat.bolza.problem import Bolza
from controlat.bolza.programming import programme
from controlat.symbolic import Branch, Landscape

HERE = Path(__file__).resolve().parent
CASES = list(itertools.product((0.5, 1.0, 2.0), (1.0, 10.0), (1.0, 3.0), (0.0, 1e-3, 1e-2, 0.1, 1.0)))
LIMITS = [(2.0, tau, horizon) for tau in (1.0, 2.0) for horizon in (1.0, 3.0)] + [
    (2.0, 2.5, 3.0),
    (1.0, 10.0, 1.0),
]
EXAMPLE = (1.0, 10.0, 1.0, 0.01)  # theta_0, tau, T, gamma
TAUS, RATIOS = (1.0, 10.0), (0.9, 0.7, 0.5, 0.3, 0.1)  # of alpha/alpha*, at gamma = 0
BOUNDS: dict[str, dict[str, Any]] = {
    "no noise": {},
    "no noise, x in [-2, 2]": {"x_range": (-2.0, 2.0)},
    "sigma = 0.1": {"sigma": 0.1},
}


def branch(theta0: float) -> Branch:
    """x* = theta, from theta_0 on."""
    landscape = Landscape()
    (point,) = [p for p in landscape.stationary(theta0) if p.kind == "maximum"]
    return Branch(landscape, theta0, point.x, (-5.0, 5.0))


def case(theta0: float, tau: float, horizon: float, gamma: float) -> dict[str, Any]:
    """One problem on alpha K = tau: is anything better than the derived schedule?"""
    problem = Bolza(branch(theta0), theta0, tau, horizon, gamma)
    search, gap = programme(problem, follow=False), criterion(problem, derived_path(problem))
    return {
        "theta0": theta0,
        "tau": tau,
        "horizon": horizon,
        "gamma": gamma,
        "derived": search.derived,
        "best": search.best,
        "given_away": search.difference,
        "better": bool(search.better),
        "C": gap.c,
    }


def sets() -> list[dict[str, Any]]:
    """The four sets for the example: J of the derived schedule, the same on the grid, and the best there."""
    theta0, tau, horizon, gamma = EXAMPLE
    rows = []
    for name in SETS:
        problem = Bolza(branch(theta0), theta0, tau, horizon, gamma, name)
        search, exact = programme(problem, follow=False), derived_path(problem).cost
        on_grid = {"grid": search.derived, "best": search.best, "better": bool(search.better)}
        rows.append({"set": name, "derived": exact} | on_grid)
    return rows


def ties() -> list[dict[str, Any]]:
    """By how much, relatively, constant alpha/alpha* below 1 raises J = L(theta_T) at gamma = 0."""
    theta0, _, horizon, _ = EXAMPLE
    rows = []
    for tau, q in itertools.product(TAUS, RATIOS):
        problem = Bolza(branch(theta0), theta0, tau, horizon, 0.0)

        def slope(t: float, y: Any, problem: Bolza = problem, q: float = q) -> Any:
            return problem.flow(y, q, problem.count(y) / q)

        end = solve_ivp(slope, (0, horizon), [theta0], "DOP853", rtol=1e-13, atol=1e-15).y[:, -1]
        best = theta0**2 * math.exp(-2 * horizon) / 2
        rows.append({"tau": tau, "ratio": q, "raised": float(problem.branch.robust(end)[0]) / best - 1})
    return rows


def limits() -> list[dict[str, Any]]:
    """The largest gamma for which the derived schedule satisfies the principle; None above 1e4."""
    rows = []
    for theta0, tau, horizon in LIMITS:
        limit = gamma_limit(Bolza(branch(theta0), theta0, tau, horizon, 0.0))
        gamma = limit if math.isfinite(limit) else None
        rows.append({"theta0": theta0, "tau": tau, "horizon": horizon, "gamma": gamma})
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The tables, from the result file alone."""
    cases = result["cases"]
    lost = [row for row in cases if row["better"]]
    keys = ("theta0", "tau", "horizon", "gamma", "derived", "best", "given_away", "C")
    bounds = [
        [name, f"{r['T']}", f"{r['left']:.3g}", f"{r['printed']:.3g}", f"{r['corrected']:.3g}"]
        for name, rows in result["bounds"].items()
        for r in rows
    ]
    return "\n\n".join(
        [
            f"Nothing better was found in {len(cases) - len(lost)} of {len(cases)} cases; "
            f"C is 0 in {sum(row['C'] < 1e-9 for row in cases)}. The others:",
            table(keys, [[f"{row[key]:.4g}" for key in keys] for row in lost], words=()),
            "Largest gamma for which the maximum principle holds:",
            table(
                ["theta0", "tau", "horizon", "gamma"],
                [
                    [f"{v:.4g}" if v is not None else "above 1e4" for v in row.values()]
                    for row in result["limits"]
                ],
                words=(),
            ),
            "Admissible sets, theta0 = 1, tau = 10, T = 1, gamma = 0.01:",
            table(
                ["set", "derived", "derived, on the grid", "best, on the grid"],
                [
                    [r["set"], f"{r['derived']:.5f}", *(f"{r[key]:.4f}" for key in ("grid", "best"))]
                    for r in result["sets"]
                ],
            ),
            "gamma = 0, theta0 = 1, T = 1: by how much constant alpha/alpha* raises J, relatively:",
            table(
                ["tau", *(f"{q:g}" for q in RATIOS)],
                [
                    [f"{tau:g}", *(f"{r['raised']:.2g}" for r in result["ties"] if r["tau"] == tau)]
                    for tau in TAUS
                ],
                words=(),
            ),
            "Theorem 1, theta0 = 1:",
            table(["runs", "T", "measured", "printed", "corrected"], bounds),
        ]
    )


def main() -> None:
    """Compute and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "landscape_checks")
    out = parser.parse_args().out
    result = {
        "environment": environment(),
        "cases": [case(*numbers) for numbers in CASES],
        "limits": limits(),
        "sets": sets(),
        "ties": ties(),
        "bounds": {
            name: convergence(branch(1.0), 1.0, **options).to_json()["rows"]
            for name, options in BOUNDS.items()
        },
    }
    write_json(out / "result.json", result)
    write_text(out / "table.md", markdown(result) + "\n")
    print(markdown(result))


if __name__ == "__main__":
    main()
