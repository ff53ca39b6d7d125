"""What the pages show, derived from the records and from what Flower saw of their tasks. Pure.

The records are the truth about a move. Flower's states are beside them for whoever looks for a task's worker or
traceback: after a worker's SIGKILL Flower shows STARTED for ever, and after its own restart it knows nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from routing.subjects import actor_of_key
from workflows import presentation
from workflows.records import STATUS_AFTER, STEPS, TERMINAL, MigrationPlan, MigrationStatus, Move, to_document

TaskState = Callable[[str], str | None]  # a task id -> Celery's state as Flower saw it; None when it never did

IN_FLIGHT = tuple(
    status for status in MigrationStatus if status not in TERMINAL and status is not MigrationStatus.PLANNED
)


class Progress(StrEnum):
    """How far a move has come with one of its steps."""

    DONE = "done"
    RUNNING = "running"  # sent to the workers, and the record waits for it
    STOPPED = "stopped"  # the move ended before this step was done
    WAITING = "waiting"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    """One step of a move. `duration_ms` counts from the step before; the first one's from the launch."""

    name: str
    progress: Progress
    reached_at: float | None
    duration_ms: float | None
    task_id: str | None
    task_state: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveView:
    """A move and its six steps in order."""

    move: Move
    steps: tuple[StepView, ...]

    @classmethod
    def of(cls, move: Move, task_state: TaskState) -> MoveView:
        return cls(move=move, steps=tuple(_steps(move, task_state)))

    @property
    def in_flight(self) -> bool:
        return self.move.status in IN_FLIGHT

    @property
    def actor(self) -> str | None:
        """The actor that moves alone; None when it is a whole shard."""
        actor = actor_of_key(self.move.unit)
        return str(actor) if actor is not None else None

    @property
    def tried_again(self) -> bool:
        """Whether some step took more than one attempt."""
        return self.move.attempts > sum(step.progress is Progress.DONE for step in self.steps)

    def badge(self, step: StepView) -> str | None:
        """Celery's state of the step's task, where it says more than the record does.

        A task whose step was not taken, because the move had ended, succeeds like any other.
        """
        skipped = step.progress is Progress.WAITING and self.move.status in TERMINAL
        return None if skipped or step.task_state == "SUCCESS" else step.task_state

    @property
    def total_ms(self) -> float | None:
        """From the launch to the end."""
        return _between_ms(_launched_at(self.move), self.move.finished_at)

    @property
    def spans(self) -> dict[str, tuple[float, float]]:
        """Where each finished step lies between the launch and the latest one: start and width, in percent."""
        timed = [(step.name, step.duration_ms) for step in self.steps if step.duration_ms is not None]
        whole_ms = sum(duration_ms for _, duration_ms in timed) or 1.0
        spans, start_ms = {}, 0.0
        for name, duration_ms in timed:
            spans[name] = (100 * start_ms / whole_ms, 100 * duration_ms / whole_ms)
            start_ms += duration_ms
        return spans

    def to_document(self) -> dict[str, Any]:
        """The move's record, with `steps` in the place of the bare task ids."""
        document = to_document(self.move)
        del document["task_ids"]
        return document | {"steps": [asdict(step) for step in self.steps]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The plan that was asked for, else the latest, whatever is filtered; and the moves that match, newest first."""

    plan: MigrationPlan | None
    moves: tuple[MoveView, ...]

    @property
    def in_flight(self) -> int:
        return sum(view.in_flight for view in self.moves)

    @property
    def blackouts_ms(self) -> list[float]:
        """Of the moves shown that had actors, ascending: nobody waits for an empty shard."""
        moves = (view.move for view in self.moves if view.move.actors_total)
        return sorted(move.blackout_ms for move in moves if move.blackout_ms is not None)

    def blackout_ms(self, percent: int) -> float | None:
        return percentile(self.blackouts_ms, percent)

    def to_document(self) -> dict[str, Any]:
        return {
            "plan": to_document(self.plan) if self.plan else None,
            "blackout_ms": {"p50": self.blackout_ms(50), "p99": self.blackout_ms(99)},
            "moves": [view.to_document() for view in self.moves],
        }


def _steps(move: Move, task_state: TaskState) -> Iterable[StepView]:
    previous_at = _launched_at(move)
    stopped = move.status in TERMINAL and move.status is not MigrationStatus.COMPLETED
    for name in STEPS:
        reached_at = _reached_at(move, name)
        if reached_at is not None or move.status is MigrationStatus.COMPLETED:
            progress = Progress.DONE  # without a time: the map said "completed" before the record had come this far
        elif stopped:
            progress, stopped = Progress.STOPPED, False
        elif name == move.step and move.started_at is not None:
            progress = Progress.RUNNING
        else:
            progress = Progress.WAITING
        task_id = move.task_ids.get(name)
        yield StepView(
            name=name, progress=progress, reached_at=reached_at, duration_ms=_between_ms(previous_at, reached_at),
            task_id=task_id, task_state=task_state(task_id) if task_id else None,
        )  # fmt: skip
        previous_at = reached_at or previous_at


def _reached_at(move: Move, step: str) -> float | None:
    """When the status that follows the step was reached. The last step's time is the end's, if that is completion."""
    if STATUS_AFTER[step] is MigrationStatus.COMPLETED:
        return move.finished_at if move.status is MigrationStatus.COMPLETED else None
    at: float | None = getattr(move, f"{STATUS_AFTER[step]}_at")
    return at


def _launched_at(move: Move) -> float:
    return move.started_at if move.started_at is not None else move.created_at


def _between_ms(start: float | None, end: float | None) -> float | None:
    """Never negative: the times are from the clocks of different workers."""
    return None if start is None or end is None else round(max(0.0, end - start) * 1000, 3)


def percentile(ascending: Sequence[float], percent: int) -> float | None:
    """By nearest rank: the smallest value that at least `percent` % of the values do not exceed."""
    if not ascending:
        return None
    rank = -(-len(ascending) * percent // 100)
    return ascending[max(rank, 1) - 1]


# -- for people --------------------------------------------------------------------------------------------------------


def milliseconds(value: float | None) -> str:
    """Three digits are as much as anybody compares; a dash when not known."""
    match value:
        case None:
            return "—"
        case _ if value < 9.95:
            return f"{value:.1f} ms"
        case _ if value < 999.5:
            return f"{value:.0f} ms"
        case _ if value < 59_995:
            return f"{value / 1000:.2f} s"
        case _:
            minutes, seconds = divmod(round(value / 1000), 60)
            return f"{minutes}m {seconds:02}s"


def size(value: int | None) -> str:
    """In the units of the command line."""
    return presentation.size(value) or "—"


STATUS_BADGES = {
    MigrationStatus.PLANNED: "text-bg-secondary",
    MigrationStatus.COMPLETED: "text-bg-success",
    MigrationStatus.ROLLED_BACK: "text-bg-warning",
    MigrationStatus.FAILED: "text-bg-danger",
    MigrationStatus.CANCELLED: "migration-badge-cancelled",
} | dict.fromkeys(IN_FLIGHT, "task-state-started")

# As on Flower's own task page.
TASK_BADGES = {
    "FAILURE": "text-bg-danger",
    "STARTED": "task-state-started",
    "RETRY": "text-bg-warning",
}
OTHER_TASK_BADGE = "text-secondary-emphasis bg-secondary-subtle"
