"""What the Migrations page derives from a record, and what it does to Flower's navigation bar. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from routing.errors import Incompatible, InvalidInput
from workflows.flower_page.install import with_tab
from workflows.flower_page.reading import Filters
from workflows.flower_page.view import STATUS_BADGES, MoveView, Overview, milliseconds, percentile, size
from workflows.records import STATUS_AFTER, STEPS, MigrationStatus, Move, advance


def a_move(**given: Any) -> Move:
    task_ids = {step: f"task-{step}" for step in STEPS}
    return Move(
        id="m", plan_id="p", unit="shard.3", shard=3, source="a", destination="b", created_at=100.0,
        **{"task_ids": task_ids, **given},
    )  # fmt: skip


def after(move: Move, *statuses: MigrationStatus) -> Move:
    """One second per status from 101."""
    for number, status in enumerate(statuses, start=1):
        move = advance(move, status, now=100.0 + number)
    return move


def progress(move: Move) -> list[str]:
    return [step.progress.value for step in MoveView.of(move, lambda _: None).steps]


def test_a_planned_move_waits_until_it_is_launched() -> None:
    """Then its first step is running: the launch is what `started_at` says."""
    assert progress(a_move()) == ["waiting"] * 6
    assert progress(a_move(started_at=100.5)) == ["running"] + ["waiting"] * 5


def test_every_status_has_as_many_steps_done_as_its_place_says() -> None:
    """From planned to completed, one more each time."""
    statuses = list(STATUS_AFTER.values())
    for done in range(len(statuses) + 1):
        assert progress(after(a_move(started_at=100.5), *statuses[:done])).count("done") == done


def test_a_move_that_ended_otherwise_stopped_at_one_step() -> None:
    """The first that it had not done; nothing after it."""
    for end in (MigrationStatus.ROLLED_BACK, MigrationStatus.FAILED, MigrationStatus.CANCELLED):
        move = after(a_move(started_at=100.5), MigrationStatus.PAUSED, end)

        assert progress(move) == ["done", "stopped", "waiting", "waiting", "waiting", "waiting"]


def test_a_record_that_was_behind_its_completion_is_done_without_times() -> None:
    """The map decides that a move is completed, the record may have missed steps; no time is made up."""
    move = after(a_move(started_at=100.5), MigrationStatus.PAUSED, MigrationStatus.COMPLETED)

    view = MoveView.of(move, lambda _: None)

    assert progress(move) == ["done"] * 6
    assert [step.duration_ms for step in view.steps] == [500.0, None, None, None, None, 1000.0]
    assert view.total_ms == 1500.0


def test_clocks_that_disagree_make_no_negative_time() -> None:
    """Steps are timed by the workers that took them."""
    move = advance(a_move(started_at=200.0), MigrationStatus.PAUSED, now=199.9)

    assert MoveView.of(move, lambda _: None).steps[0].duration_ms == 0.0


def test_task_states_are_looked_up_by_the_steps_own_ids() -> None:
    """And a step without a task id has none."""
    move = a_move(task_ids={"pause": "one"})

    steps = MoveView.of(move, {"one": "RETRY"}.get).steps

    assert [step.task_state for step in steps] == ["RETRY"] + [None] * 5


def test_a_task_is_pointed_out_only_when_it_says_more_than_the_record() -> None:
    """SUCCESS beside a step that is done is noise; beside one that was never taken, a lie."""
    states = dict.fromkeys((f"task-{step}" for step in STEPS), "SUCCESS")
    ended = after(a_move(started_at=100.5), MigrationStatus.PAUSED, MigrationStatus.ROLLED_BACK)

    def badges(move: Move, **seen: str) -> list[str | None]:
        view = MoveView.of(move, (states | {f"task-{step}": state for step, state in seen.items()}).get)
        return [view.badge(step) for step in view.steps]

    assert badges(ended) == [None] * 6
    assert badges(ended, capture="FAILURE", send="FAILURE") == [None, "FAILURE"] + [None] * 4
    assert badges(a_move(started_at=100.5), pause="RETRY", capture="STARTED") == ["RETRY", "STARTED"] + [None] * 4


def test_a_move_of_one_actor_goes_by_its_name() -> None:
    """As everywhere else, not by its key in the map."""
    assert MoveView.of(replace(a_move(), unit="actor.canvas=c1"), lambda _: None).actor == "canvas/c1"
    assert MoveView.of(a_move(), lambda _: None).actor is None


def test_attempts_count_only_when_a_step_was_tried_again() -> None:
    """Each step taken is an attempt of its own."""
    move = after(a_move(started_at=100.5), *STATUS_AFTER.values())

    tried_again = [MoveView.of(replace(move, attempts=n), lambda _: None).tried_again for n in (6, 7)]

    assert tried_again == [False, True]


def test_blackouts_are_those_of_moves_with_actors() -> None:
    """Most shards of a small cluster are empty: nobody waits for them, and they would hide who does."""
    moves = [a_move(blackout_ms=5.0), a_move(blackout_ms=80.0, actors_total=2), a_move(actors_total=1)]

    overview = Overview(plan=None, moves=tuple(MoveView.of(move, lambda _: None) for move in moves))

    assert overview.blackouts_ms == [80.0]


def test_the_timeline_is_a_hundred_percent_in_order() -> None:
    """Each step begins where the one before ended."""
    move = after(a_move(started_at=100.0), *STATUS_AFTER.values())

    spans = list(MoveView.of(move, lambda _: None).spans.values())

    assert [start for start, _ in spans] == pytest.approx([100 * number / 6 for number in range(6)])
    assert sum(width for _, width in spans) == pytest.approx(100)
    assert MoveView.of(a_move(), lambda _: None).spans == {}


def test_every_status_has_its_badge() -> None:
    """A status that records learn later must be given a colour."""
    assert set(STATUS_BADGES) == set(MigrationStatus)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([4.0], 99, 4.0),
        ([1.0, 2.0], 50, 1.0),
        ([1.0, 2.0, 3.0], 50, 2.0),
        ([float(n) for n in range(1, 101)], 99, 99.0),
        ([float(n) for n in range(1, 102)], 99, 100.0),
    ],
)
def test_percentiles_are_values_that_were_measured(values: list[float], percent: int, expected: float | None) -> None:
    """By nearest rank, nothing in between."""
    assert percentile(values, percent) == expected


def test_durations_and_sizes_are_short() -> None:
    """Three digits and a unit."""
    shown = [milliseconds(value) for value in (None, 0.04, 9.94, 9.96, 999.4, 999.6, 59_990, 59_996, 3_600_000)]

    assert shown == ["—", "0.0 ms", "9.9 ms", "10 ms", "999 ms", "1.00 s", "59.99 s", "1m 00s", "60m 00s"]
    assert [size(None), size(0), size(1_500)] == ["—", "0 B", "1.5 KiB"]


def test_filters_come_back_as_the_query_they_were_read_from() -> None:
    """What links of the page are made of; empty ones are not asked."""
    asked = {"plan": " p1 ", "status": "rolled_back", "actor": "cart/a b", "limit": "7", "other": "x"}

    filters = Filters.parse(asked)

    assert filters.query() == "?plan=p1&status=rolled_back&actor=cart%2Fa+b&limit=7"
    assert filters.query(status="") == "?plan=p1&actor=cart%2Fa+b&limit=7"
    assert Filters.parse({"plan": "", "status": ""}).query() == ""
    assert Filters.parse({"status": "in_flight"}).query() == "?status=in_flight"


@pytest.mark.parametrize(
    "wrong", [{"limit": "501"}, {"limit": "-1"}, {"limit": "²"}, {"actor": "x"}, {"status": "PAUSED"}]
)
def test_malformed_filters_are_refused(wrong: dict[str, str]) -> None:
    """At the door, in one line."""
    with pytest.raises(InvalidInput):
        Filters.parse(wrong)


def test_the_tab_follows_flowers_last_one() -> None:
    """Inside the same list."""
    bar = (
        "<ul><li>{% if active_tab == 'tasks' %}<a href=\"{{ reverse_url('tasks') }}\"></a></li>"
        "<li><a href=\"{{ reverse_url('broker') }}\" {% if active_tab == 'broker' %}></a></li></ul><ul><li></li></ul>"
    )

    before, tab, after = with_tab(bar).partition("{{ reverse_url('migrations') }}")

    assert tab
    assert before.count("<li") == 3
    assert after.count("</li>") == 2
    assert after.endswith("</li></ul><ul><li></li></ul>")


@pytest.mark.parametrize("bar", ["", "<ul><li>{{ reverse_url('queues') }}</li></ul>", "{{ reverse_url('broker') }}"])
def test_a_bar_without_its_anchor_is_refused(bar: str) -> None:
    """Rather than a page without a way to it."""
    with pytest.raises(Incompatible, match=r"navbar\.html.*install flower"):
        with_tab(bar)
