"""What a search would do, as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlat._util.texts import count, duration, table

__all__ = ["search_plan_text"]


def search_plan_text(plan: Mapping[str, Any]) -> str:
    """What `controlat.app.search_plan.search_plan` tells: spaces, stages and costs, price, seeds."""
    s, unit, seeds = plan["settings"], plan["unit"], plan["settings"]["judge_seeds"]
    spaces = [[e["name"], str(len(e["parameters"])), e["text"]] for e in plan["spaces"]]
    weight = plan["price"] * unit["mean_cost"]
    names = ", ".join(row["name"] for row in plan["rows"])
    return "\n".join(
        [
            table(["space", "parameters", "schedules"], spaces, words=(0, 2)),
            "",
            table(["stage", "trainings", "gradient evaluations"], _stages(plan)),
            "",
            f"- {unit['schedule']}, the unit: {count(unit['gradients'])} gradient evaluations with Phi, n "
            f"{unit['mean_cost']:.3g}.",
            f"- J = Phi + {plan['price']:.4g} n: all the cost of the unit weighs {weight:.3g}.",
            f"- proposer {s['proposer']}; budget {s['budget']}, half of it for exploring; counted with "
            "trials spread evenly and an undecided race.",
            f"- judged under seeds {', '.join(map(str, seeds))}: {names}.",
            f"about {duration(plan['expected_seconds'])} on this machine; nothing was written",
        ]
    )


def _stages(plan: Mapping[str, Any]) -> list[list[str]]:
    """Trainings and gradient evaluations of every stage, each training counted where it comes first."""
    known: set[tuple[Any, ...]] = set()
    spent: dict[str, list[float]] = {}
    for trial in plan["trials"]:
        fidelity = (trial["epochs"], trial["points"], trial["until"])
        new = [r for r in trial["runs"] if (trial["schedule"], r["seed"], fidelity) not in known]
        known |= {(trial["schedule"], run["seed"], fidelity) for run in new}
        spent.setdefault(trial["stage"], []).extend(run["gradients"] for run in new)
    rows = [[stage, str(len(each)), count(sum(each))] for stage, each in spent.items()]
    judged = len(plan["rows"]) * len(plan["settings"]["judge_seeds"])
    return [*rows, ["judgement", str(judged), count(plan["judging"])]]
