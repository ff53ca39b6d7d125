"""Those who write records, over a shelf: a worker, a leader's admission and reconciler, a whole coordinator."""

from __future__ import annotations

import asyncio
from typing import Any

from routing.errors import TransientError
from tests.unit.cluster import SmallCluster
from tests.unit.shelf import Shelf
from tests.unit.virtual_time import clock, wall_clock
from workflows.admission import Admission
from workflows.context import StepContext
from workflows.coordinator import Coordinator
from workflows.reconciler import Reconciler
from workflows.records import Move


def worker(small: SmallCluster, shelf: Shelf) -> StepContext:
    store: Any = shelf
    return StepContext(
        link=small.link, subjects=small.subjects, directory=small.directory, store=store, settings=small.settings,
        wall_clock=wall_clock,
    )  # fmt: skip


class Office:
    """Admission and reconciler of one leader over a shelf, with the cluster's map."""

    def __init__(self, small: SmallCluster, shelf: Shelf, *, moves_at_once: int = 2) -> None:
        store: Any = shelf
        self.launched: list[str] = []
        self.context = StepContext(
            link=small.link, subjects=small.subjects, directory=small.directory, store=store, settings=small.settings,
            wall_clock=wall_clock,
        )  # fmt: skip
        self.admission = Admission(
            store=store, directory=small.directory, context=self.context, launch=self._launch,
            moves_at_once=moves_at_once, wall_clock=wall_clock,
        )  # fmt: skip
        self.reconciler = Reconciler(
            store=store, directory=small.directory, context=self.context, admission=self.admission,
            records_kept=1000, wall_clock=wall_clock, clock=clock,
        )  # fmt: skip

    async def _launch(self, move: Move) -> None:
        self.launched.append(move.id)

    async def run(self, for_s: float) -> None:
        """What Coordinator._tend_moves does while nothing changes in membership."""
        until_s = clock() + for_s
        while clock() < until_s:
            for act in (self.reconciler.reconcile, lambda: self.admission.admit(("a", "b"))):
                try:
                    await act()
                except TransientError:
                    break
            await asyncio.sleep(1.0)


async def coordinator(
    small: SmallCluster, link: Any = None, *, shelf: Shelf | None = None, launched: list[Move] | None = None
) -> tuple[Coordinator, asyncio.Task[None], asyncio.Event]:
    """A coordinator that serves, its task, and what ends it; what it launches goes nowhere but into `launched`."""
    moves = [] if launched is None else launched

    async def launch(*begun: Move) -> None:
        moves.extend(begun)

    store: Any = Shelf() if shelf is None else shelf
    process = Coordinator(
        small.settings, name="c", link=link or small.nats.link("coordinator"), store=store, launch=launch, clock=clock,
        wall_clock=wall_clock,
    )  # fmt: skip
    await process.start()
    stopping = asyncio.Event()
    return process, asyncio.create_task(process.serve(stopping)), stopping
