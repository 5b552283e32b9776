"""Schedules derived from a landscape, beside Amata's linear one and PGD: what are they worth on networks?

    python analysis/landscape_schedule.py                    # digits, 8 seeds: 15 minutes on a core
    python analysis/landscape_schedule.py --part mnist --data-dir FOLDER    # LeNet, 3 seeds: an hour

The landscape is Amata's (Ye et al., 2021, equation 11). *derived* is its K*(t) for theta_0 = 1, T = 3,
stretched to 1..10. *calibrated* has theta_0, the scale of time and tau fitted to how many inner steps a
network needed in a training run of another seed, which the comparison does not use: its K* is in steps of
the network. *stretched* is that, stretched to 1..10. Beside each stands the linear ramp that takes (nearly)
as many inner steps. A schedule that was searched for is compared too: --searched FILE.json.

Runs are kept in --work, where the same command goes on after an interruption; results go to
analysis/landscape_schedule/PART: result.json, table.md, schedules.png.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter
from scipy.stats import t as student

import controlat
from controlat._util.drawing import MARKERS, line_style, panels, save
from controlat._util.files import write_json, write_text
from controlat._util.texts import count, table
from controlat.control.schedules import Schedule

HERE = Path(__file__).resolve().parent
CALIBRATION_SEED = 100  # not among the seeds that are compared
LEAST, MOST = 1, 10

PARTS: dict[str, dict[str, Any]] = {
    "digits": {
        "problem": {"data": "digits", "model": "mlp", "eps": 0.15, "epochs": 12},
        "seeds": [0, 1, 2, 3, 4, 5, 6, 7],
        "evaluation": {"gamma": 0.001, "horizons": [1]},
    },
    "mnist": {
        "problem": {
            "data": "mnist",
            "model": "lenet",
            "eps": 0.2,
            "epochs": 8,
            "batch_size": 64,
            "lr": 0.02,
            "train_points": 6000,
            "test_points": 500,
        },
        "seeds": [0, 1, 2],
        "evaluation": {
            "full": False,
            "probe": 128,
            "alphas": [0.05, 0.2],
            "gamma": 0.001,
            "attacks": ["pgd-20", "pgd-50-5", "cw-30"],
        },
    },
}


def amata(least: float, tau: float, most: float = MOST) -> str:
    """Amata's linear ramp."""
    return f"amata:min={least:.6g},max={most:.6g},tau={tau:.6g}"


def steps(schedule: Schedule) -> list[int]:
    """K of every epoch."""
    return [int(schedule(epoch)["steps"]) for epoch in range(int(schedule.epochs))]


def equal_cost(schedule: Schedule, tau: float) -> str:
    """The linear ramp, up to the same K or to 10, that takes as many inner steps as a schedule, or nearly."""
    wanted, top, epochs = statistics.fmean(steps(schedule)), max(steps(schedule)), int(schedule.epochs)

    def off(text: str) -> float:
        return abs(statistics.fmean(steps(controlat.parse_schedule(text, epochs))) - wanted)

    ramps = [amata(least, tau, top) for least in np.arange(LEAST, top + 0.05, 0.1)]
    ramps += [amata(LEAST, tau, most) for most in np.arange(top, 2 * top, 0.1)]
    return min(ramps, key=off)


def calibrate(part: Mapping[str, Any], work: Path, data_dir: str | None, threads: int) -> controlat.Derived:
    """One run under Amata's schedule, and the landscape that fits what its network needed."""
    problem = part["problem"] | {"data_dir": data_dir, "threads": threads}
    tau = 2 * problem["eps"]
    run = work / "run"
    resume = (run / "settings.json").exists()
    controlat.train(run, schedule=amata(LEAST, tau), seed=CALIBRATION_SEED, resume=resume, **problem)
    return controlat.derive(
        out=work / "calibrated", calibrate=str(run), data_dir=data_dir, threads=threads, checks=False
    )


def candidates(
    part: Mapping[str, Any], calibrated: controlat.Derived, searched: str | None, work: Path
) -> dict[str, str]:
    """Name -> schedule (a short text or a file) of everything that is compared."""
    epochs, tau = part["problem"]["epochs"], 2 * part["problem"]["eps"]
    derived = controlat.derive(checks=False, epochs=epochs, tau_net=tau, k_min=LEAST, k_max=MOST).schedule
    stretched = calibrated.for_network(
        epochs=epochs, k_min=LEAST, k_max=MOST, tau=tau, label=f"stretched({LEAST}..{MOST})"
    )
    own = {"derived": derived, "calibrated": calibrated.schedule, "stretched": stretched}
    found = {f"PGD-{MOST}": f"pgd:steps={MOST},alpha={tau / MOST:.6g}", "Amata": amata(LEAST, tau)}
    for name, schedule in own.items():
        path = work / f"{name}.json"
        schedule.save(path, overwrite=True)
        found[name] = str(path)
        ramp = equal_cost(schedule, tau)
        if steps(controlat.parse_schedule(ramp, epochs)) != steps(schedule):
            found[f"linear, as many steps as {name}"] = ramp
    found["PGD-2"] = f"pgd:steps=2,alpha={tau / 2:.6g}"
    if searched is not None:
        found["searched"] = searched
    return found


def digest(
    part: Mapping[str, Any],
    named: Mapping[str, str],
    result: Mapping[str, Any],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """What the tables need, by schedule and seed, and paired differences to Amata's schedule."""
    rows = []
    for name, entry in zip(named, result["schedules"], strict=True):
        summary = entry["summary"]
        row = {
            "name": name,
            "text": entry["text"] if ":" in entry["text"] or entry["text"] == "none" else name,
            "steps": steps(Schedule.from_json(entry["schedule"])),
            **{key: summary[key]["per_seed"] for key in ("robust", "clean", "gradients", "seconds")},
        }
        if "full" in summary:
            row["J"] = summary["full"]["objective"]["per_seed"]
        rows.append(row)
    first = next(row for row in rows if row["name"] == "Amata")
    for row in rows:
        for key in ("robust", "J"):
            if key in row:
                row[f"{key} - Amata"] = difference(row[key], first[key])
    return {
        "problem": dict(part["problem"]),
        "seeds": list(part["seeds"]),
        "points": result["schedules"][0]["summary"]["robust"]["points"],
        "attacks": result["settings"]["attacks"],
        "gamma": part["evaluation"]["gamma"],
        "environment": result["environment"],
        "fit": calibration["fit"],
        "measured": {
            key: calibration["measured"][key]
            for key in ("times", "measures", "gradients", "seconds", "same", "seed")
        },
        "schedules": rows,
    }


def difference(values: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    """Mean of paired differences, and its 95 % interval by Student's t."""
    d = np.asarray(values) - np.asarray(others)
    half = float(student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / np.sqrt(len(d))) if len(d) > 1 else 0.0
    return {"mean": float(d.mean()), "interval": [float(d.mean()) - half, float(d.mean()) + half]}


def markdown(found: Mapping[str, Any]) -> str:
    """The table of README."""
    objective = "J" in found["schedules"][0]
    heads = ["schedule", "K per epoch", "mean K", *(["J", "J - Amata"] if objective else []), "clean %"]
    heads += ["robust %", "robust - Amata", "gradient evals", "seconds"]
    return table(heads, [_cells(row, objective) for row in found["schedules"]], words=(0, 1))


def _cells(row: Mapping[str, Any], objective: bool) -> list[str]:
    def spread(values: Sequence[float], scale: float, digits: int) -> str:
        return f"{scale * statistics.fmean(values):.{digits}f} ±{scale * statistics.stdev(values):.{digits}f}"

    def change(key: str, scale: float, digits: int) -> str:
        d = row[key]
        low, high = (scale * v for v in d["interval"])
        text = f"{scale * d['mean']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
        return "" if row["name"] == "Amata" else text

    return [
        row["name"],
        " ".join(map(str, row["steps"])),
        f"{statistics.fmean(row['steps']):.2f}",
        *([spread(row["J"], 1, 3), change("J - Amata", 1, 3)] if objective else []),
        spread(row["clean"], 100, 1),
        spread(row["robust"], 100, 1),
        change("robust - Amata", 100, 1),
        count(statistics.fmean(row["gradients"])),
        f"{statistics.fmean(row['seconds']):.1f}",
    ]


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Steps per epoch, the fit, and robust accuracy against cost."""
    figure, axes = panels(13.5, 4.4, 3)
    for i, row in enumerate(found["schedules"]):
        style = line_style(i)
        t = range(len(row["steps"]) + 1)
        k = np.array([*row["steps"], row["steps"][-1]]) + 0.06 * (i - 3)  # apart, where they coincide
        axes[0].step(t, k, where="post", label=row["name"], **style)
        robust = 100 * np.asarray(row["robust"])
        half = student.ppf(0.975, len(robust) - 1) * robust.std(ddof=1) / np.sqrt(len(robust))
        cost = statistics.fmean(row["gradients"])
        axes[2].errorbar(cost, robust.mean(), half, fmt=MARKERS[i % 8], capsize=3, color=style["color"])
    axes[0].set_xlabel("t (epochs)")
    axes[0].set_ylabel("inner steps K")
    measure, fit = found["measured"], found["fit"]
    values = measure["measures"]["convergence"]["values"]
    axes[1].plot(measure["times"], values, "o", color="black", label="measured on a network")
    axes[1].plot(fit["times"], fit["fitted"], color="#D55E00", lw=2, label="the landscape, fitted")
    axes[1].set_xlabel("t (epochs)")
    axes[1].set_ylabel("inner steps needed")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=8)
    axes[2].set_xlabel("gradient evaluations of training")
    axes[2].set_ylabel("robust accuracy (%)")
    axes[2].set_title("mean over seeds and its 95 % interval", fontsize=9)
    axes[2].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    save(figure, path)


def main() -> None:
    """Train what is missing, then write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--searched", help="a schedule that was searched for, as a JSON file")
    parser.add_argument("--work", type=Path, default=Path("landscape-schedule-runs"))
    parser.add_argument("--out", type=Path, default=HERE / "landscape_schedule")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    part, work = PARTS[chosen.part], chosen.work / chosen.part
    work.mkdir(parents=True, exist_ok=True)
    calibrated = calibrate(part, work, chosen.data_dir, chosen.threads)
    named = candidates(part, calibrated, chosen.searched, work)
    result = controlat.evaluate(
        work / "evaluation",
        **part["problem"],
        **part["evaluation"],
        schedules=list(named.values()),
        seeds=part["seeds"],
        data_dir=chosen.data_dir,
        threads=chosen.threads,
    )
    found = digest(part, named, result, calibrated.result["calibration"])
    write_json(chosen.out / chosen.part / "result.json", found)
    present(found, chosen.out / chosen.part)
    print(markdown(found))


def present(found: Mapping[str, Any], out: Path) -> None:
    """The table and the figure, from the result file alone."""
    write_text(out / "table.md", markdown(found) + "\n")
    draw(found, out / "schedules.png")


if __name__ == "__main__":
    main()
