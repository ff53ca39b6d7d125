"""The destination's side of a move: what the source asks of it.

    stage (handle_migration_request) -> chunks -> verify -> activate

Until the map says that the unit is this node's, all of it is inactive, and may be lost at any time
(runtime/arrivals.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from routing.control import MigrationRequest, StepRequest
from routing.directory import Directory
from routing.errors import FerryError, NotApplicable
from routing.failpoints import Failpoints
from routing.settings import Settings
from routing.shard_map import Ownership
from runtime.arrivals import StagedActors
from runtime.catch_up import CatchUp
from runtime.handover import ACTIVATE_S, PATIENCE
from runtime.host import Host

NEWS_S = 0.05  # the map's watch tells of a COMMIT at about the time its source does


class Reception:
    """Takes in what sources send to a host, one verb at a time. Every verb may be asked again."""

    def __init__(
        self, *, host: Host, catch_up: CatchUp, arrivals: StagedActors, directory: Directory, settings: Settings,
        clock: Callable[[], float], failpoints: Failpoints,
    ) -> None:  # fmt: skip
        self._host, self._catch_up, self._arrivals = host, catch_up, arrivals
        self._directory, self._settings, self._clock, self._failpoints = directory, settings, clock, failpoints

    async def handle_migration_request(self, request: MigrationRequest) -> dict[str, Any]:
        """A source announces actors: answers `{"lacking": [index, ...]}`, what is to be sent.

        Raises NotApplicable unless the map says that this move comes here, UnknownActorType, PayloadTooLarge.
        """

        def comes_here(view: Ownership) -> bool:
            return view.move == request.move and view.destination == self._host.node_id

        if not await self._directory.holds(request.unit, comes_here):
            raise NotApplicable(f"{request.unit} is not coming here with {request.move}")
        lacking = self._arrivals.announce(request)
        answer: dict[str, Any] = {"lacking": lacking}
        if request.verify and not lacking:
            with suppress(FerryError):  # whoever asks for the acknowledgement is told
                self._failpoints.hit("verify")
                verified = await self._verified_here(request.move)
                answer |= {} if verified.get("pending") else verified
        return answer

    async def verify(self, request: StepRequest) -> dict[str, Any]:
        """Check and decode what arrived, and bring it to the version it was announced at.

        Answers `{"actors", "incarnation"}`, with `"pending": true` while there is more to do: ask again. Raises
        Unavailable when something is missing, StateNotPortable.
        """
        return await self._verified_here(request.move)

    async def verify_ahead(self, request: StepRequest) -> dict[str, Any]:
        """The same for what is copied ahead, before anybody stands still for it."""
        return await self._verified_here(request.move, ahead=True)

    async def activate(self, request: StepRequest) -> dict[str, Any]:
        """The source has committed: take the unit over now instead of when the map's news arrives."""
        await self._directory.news(request.unit, beyond=request.epoch, timeout_s=NEWS_S)
        await self._host.opened(request.unit, timeout_s=ACTIVATE_S)
        return {"actors": len(self._host.units[request.unit].actors)}

    async def _verified_here(self, move: str, *, ahead: bool = False) -> dict[str, Any]:
        until_s = self._clock() + self._settings.append_timeout_s * PATIENCE
        ready = await self._arrivals.verify(move, until_s=until_s, ahead=ahead)
        current = await self._arrivals.catch_up(move, self._catch_up.replay_on, until_s=until_s)
        answer: dict[str, Any] = {"actors": ready, "incarnation": self._host.incarnation}
        return answer if current and ready == self._arrivals.announced(move) else answer | {"pending": True}
