"""Curves and rates are those of the log."""

from __future__ import annotations

import math

from smt_peft.report.chart import line_chart, ticks
from smt_peft.report.series import curves, rates, tokens_per_second


def entry(step: int, **values) -> dict:
    return {"step": step, "loss": 1.0, **values}


def test_tokens_per_second_of_a_training_in_one_go():
    history = [entry(1, num_tokens=100, elapsed=2.0), entry(2, num_tokens=300, elapsed=4.0)]
    assert tokens_per_second(history) == 300 / 4
    assert rates(history) == ((1, 50.0), (2, 100.0))


def test_a_resumed_training_counts_from_where_its_process_began():
    """Both counts begin anew with a process."""
    history = [
        entry(1, num_tokens=100, elapsed=2.0),
        {"step": 1, "eval_loss": 3.0, "elapsed": 2.5},
        entry(2, num_tokens=60, elapsed=1.0),
        entry(3, num_tokens=120, elapsed=2.0),
    ]
    assert tokens_per_second(history) == (100 + 120) / (2.0 + 2.0)
    assert rates(history) == ((1, 50.0), (2, 60.0), (3, 60.0))


def test_a_log_without_times_or_tokens_has_no_rate():
    assert tokens_per_second([entry(1, num_tokens=5), entry(2, elapsed=1.0)]) is None
    assert tokens_per_second([]) is None


def test_only_what_was_logged_is_drawn():
    history = [entry(1, learning_rate=0.1), entry(2, learning_rate=0.2), {"step": 2, "eval_loss": 0.5}]
    loss, rate = curves(history, [entry(1, loss=4.0), entry(2, loss=math.nan)])
    assert (loss.title, rate.title) == ("Loss", "Learning rate")
    assert [(line.name, line.points) for line in loss.lines] == [
        ("training", ((1, 1.0), (2, 1.0))),
        ("evaluation", ((2, 0.5),)),
        ("LoRA, training", ((1, 4.0),)),
    ]
    assert curves([]) == []


def test_a_chart_puts_points_where_its_axes_say():
    (loss,) = curves([entry(0, loss=2.0), entry(10, loss=1.0), entry(20, loss=0.0)])
    chart = line_chart(loss)
    (line,) = chart.lines
    height = {label: y for y, label in chart.y_ticks}
    place = {label: x for x, label in chart.x_ticks}
    assert line.dots == ((place["0"], height["2"]), (place["10"], height["1"]), (place["20"], height["0"]))
    assert "from 2 to 0" in chart.text


def test_ticks_are_round_and_reach_around():
    for low, high in [(0, 1), (0.0123, 0.0131), (3, 4721), (-2.5, 2.5), (5, 5), (0, 0)]:
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
        assert len({round(b - a, 9) for a, b in zip(found, found[1:], strict=False)}) == 1
