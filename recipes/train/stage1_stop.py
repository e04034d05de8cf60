"""When Stage 1 is done, and when it must not go on.

Place in the path: evaluations, router figures -> **stage1_stop** -> stage1_run. Pure.

Invariants: the run is done when the format is valid and stable, the held-out loss is flat and no router has collapsed;
a collapsed router ends it at once, but not before the step from which the alarm counts; what cannot be judged yet is
None and decides nothing.

Example:
    >>> judge_stop([], {"step": 0, "layers": []}, stop)["verdict"]
    'go on'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Verdict = Literal["go on", "done", "router collapse"]


def judge_stop(
    evaluations: Sequence[Mapping[str, Any]], router: Mapping[str, Any], stop: Mapping[str, Any]
) -> dict[str, Any]:
    """The rules of [stop], each with its figure, and the verdict.

    Args:    evaluations: all so far, oldest first. router: the newest line of router figures. stop: the run's [stop].
    """
    stable, flat, collapsed = _stable(evaluations, stop), _flat(evaluations, stop), collapsed_layers(router, stop)
    is_alarmed = router["step"] >= stop["alarm_after_steps"]
    verdict: Verdict = "go on"
    if collapsed and is_alarmed:
        verdict = "router collapse"
    elif stable and flat and not collapsed:
        verdict = "done"
    return {
        "format_valid_and_stable": stable,
        "held_out_flat": flat,
        "collapsed_layers": collapsed,
        "collapse_counts_from_step": stop["alarm_after_steps"],
        "verdict": verdict,
    }


def _stable(evaluations: Sequence[Mapping[str, Any]], stop: Mapping[str, Any]) -> bool | None:
    recent = evaluations[-stop["format_window"] :]
    if len(recent) < stop["format_window"]:
        return None
    rates = [one["format_validity"] for one in recent]
    return all(rate is not None and rate >= stop["min_format_validity"] for rate in rates)


def _flat(evaluations: Sequence[Mapping[str, Any]], stop: Mapping[str, Any]) -> bool | None:
    if len(evaluations) <= stop["flat_window"]:
        return None
    before, now = (one["held_out_objective"] for one in (evaluations[-1 - stop["flat_window"]], evaluations[-1]))
    return bool(before - now < stop["flat_improvement"])


def collapsed_layers(router: Mapping[str, Any], stop: Mapping[str, Any]) -> list[int]:
    """Numbers of the layers with too many dead experts, or with too much on one."""
    return [
        row["layer"]
        for row in router["layers"]
        if row["dead_experts"] > stop["max_dead"] * (row["dead_experts"] + row["active_experts"])
        or row["max_load_percent"] > 100 * stop["max_load"]
    ]
