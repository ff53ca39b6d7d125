"""What applications do: commands one by one or in ordered sessions, retries of what is in doubt, reads in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING, Any

from routing.address import ActorId
from routing.errors import FerryError, InDoubt, NotApplicable, SessionExpired
from routing.router import Router
from routing.session import Session
from tests.checker.history import Operation, Outcome, outcome_of

if TYPE_CHECKING:
    from tests.simulation.machines import SenderMachine
    from tests.simulation.world import World

RETRIES = 4  # of a command in doubt, under the same message id
PATIENCE_S = 8.0  # in peace every command is answered within it
TOGETHER = 4  # commands of one session on their way at a time

Send = Callable[[], Awaitable[Any]]


class Application:
    """One sender's story, written down as operations."""

    def __init__(self, world: World, machine: SenderMachine, chance: Random) -> None:
        assert machine.router is not None
        self._world, self._chance, self.name = world, chance, machine.name
        self._router: Router = machine.router
        self._wall_s = machine.clock.wall_s
        self._written: list[tuple[ActorId, str]] = []
        self._sent = 0
        self._sessions = 0
        self._open_session: tuple[Session, ActorId, int] | None = None  # in order so far, and its latest number

    async def run(self) -> None:
        if self._chance.random() < self._world.profile.sessions:
            await self._run_sessions()
        else:
            await self._run_plainly()

    # -- without a session -------------------------------------------------------------------------------------------
    async def _run_plainly(self) -> None:
        for _ in range(self._world.profile.commands):
            await asyncio.sleep(self._pause_s())
            if self._chance.random() < 0.3:
                await self._read()
            await self._write()

    async def _write(self, *, patiently: bool = False) -> None:
        chance, actor = self._chance, self._world.any_actor(self._chance)
        entry, name, arguments = self._command(actor)
        message_id = f"{entry}-id"

        async def send(timeout_s: float) -> Any:
            return await self._router.send_message(actor, name, arguments, message_id=message_id, timeout_s=timeout_s)

        invoked_s = self._world.now_s()
        in_doubt, reply, failed = False, None, None
        for attempt in range(RETRIES + 1):
            failed = None
            try:
                reply = await send(PATIENCE_S if patiently or attempt == RETRIES else chance.uniform(0.4, 3.0))
            except FerryError as error:
                failed = error
                in_doubt |= isinstance(error, InDoubt)
                if isinstance(error, InDoubt) and chance.random() < 0.8:
                    continue
            break
        self._keep(
            message_id, actor, invoked_s, failed, in_doubt=in_doubt, entry=entry, needs=arguments.get("needs", ""),
            reply=reply,
        )  # fmt: skip
        self._written.append((actor, entry))

    async def _read(self, session: Session | None = None, actor: ActorId | None = None, after: int = 0) -> None:
        chance = self._chance
        actor = actor or self._world.any_actor(chance)
        linearizable = chance.random() < 0.6
        self._sent += 1
        message_id = f"{self.name}-read-{self._sent}"
        invoked_s, reply, failed = self._world.now_s(), None, None
        timeout_s = chance.uniform(0.4, 3.0)
        try:
            if session is not None:
                reply = await session.query(actor, "read", linearizable=linearizable, timeout=timeout_s)
            else:
                reply = await self._router.send_message(
                    actor, "read", message_id=message_id, linearizable=linearizable, timeout_s=timeout_s
                )
        except FerryError as error:
            failed = error
        self._world.operations.append(
            Operation(
                message_id=message_id, actor=str(actor), sender=self.name, kind="query", invoked_s=invoked_s,
                returned_s=self._world.now_s(), outcome=outcome_of(failed), reply=reply, linearizable=linearizable,
                session=session.id if session is not None else "", after=after,
            )
        )  # fmt: skip

    # -- in sessions -------------------------------------------------------------------------------------------------
    async def _run_sessions(self) -> None:
        left = self._world.profile.commands
        while left > 0:
            batch = min(left, self._chance.randint(2, TOGETHER))
            left -= batch
            session = self._new_session()
            actor = self._world.any_actor(self._chance)
            rounds = self._chance.randint(1, 2)
            number = 0
            for _ in range(rounds):
                sending = []
                for _ in range(max(1, batch // rounds)):
                    number += 1
                    sending.append(asyncio.ensure_future(self._write_in(session, actor, number)))
                    await asyncio.sleep(self._pause_s() / 4)
                if self._chance.random() < 0.3:
                    await self._read(session, actor, after=number)
                if not all([await one for one in sending]):
                    self._open_session = None
                    break  # the order of this session is broken: its sender opens a new one
                self._open_session = session, actor, number

    def _new_session(self) -> Session:
        self._sessions += 1
        opened_ms = int(self._wall_s() * 1000)
        return Session(f"{opened_ms}-{self._chance.getrandbits(64):016x}", lambda: self._router)

    async def _write_in(self, session: Session, actor: ActorId, number: int, *, patiently: bool = False) -> bool:
        """Whether the session goes on."""
        timeout_s = PATIENCE_S if patiently else self._chance.uniform(2.0, 12.0)
        entry, name, arguments = self._command(actor)
        invoked_s, reply, failed = self._world.now_s(), None, None
        try:
            reply = await session.send_message(actor, name, arguments, timeout=timeout_s)
        except NotApplicable as error:
            if "order of session" in str(error):
                return False  # never sent
            failed = error
        except FerryError as error:
            failed = error
        self._keep(
            f"{session.id}.{number}", actor, invoked_s, failed, entry=entry, needs=arguments.get("needs", ""),
            reply=reply, session=session.id, number=number,
        )  # fmt: skip
        self._written.append((actor, entry))
        return not isinstance(failed, (InDoubt, SessionExpired)) and outcome_of(failed) in (
            Outcome.ACKNOWLEDGED, Outcome.REJECTED,
        )  # fmt: skip

    async def last_word(self) -> None:
        """In peace one more command is answered, in the session that is still in order if there is one."""
        if self._open_session is None:
            await self._write(patiently=True)
        else:
            session, actor, number = self._open_session
            await self._write_in(session, actor, number + 1, patiently=True)
        last = self._world.operations[-1]
        if last.outcome not in (Outcome.ACKNOWLEDGED, Outcome.REJECTED):
            self._world.problem(
                f"{last.message_id} of {self.name} to {last.actor} has no answer in peace: {last.outcome}"
            )

    def upcoming(self, ahead: int) -> str:
        """The entry of the command that this sender will send as the next but `ahead` - 1."""
        return f"{self.name}.{self._sent + ahead}"

    # -- both --------------------------------------------------------------------------------------------------------
    def _command(self, actor: ActorId) -> tuple[str, str, dict[str, Any]]:
        """(entry, handler, arguments) of the next command."""
        chance, profile = self._chance, self._world.profile
        self._sent += 1
        entry = f"{self.name}.{self._sent}"
        kind = chance.random()
        if kind < profile.conditional:
            known, needs = self._world.entries_of(actor), f"{entry}-never"
            if known and chance.random() < 0.5:
                needs = chance.choice(known[-3:])
            elif chance.random() < 0.8:  # what somebody else is about to write, here or elsewhere
                needs = chance.choice(self._world.applications).upcoming(chance.randint(1, 2))
            return entry, "write_after", {"entry": entry, "needs": needs}
        if kind < profile.conditional + profile.slow_handlers:
            return entry, "write_slowly", {"entry": entry, "delay_s": round(chance.uniform(0.01, 0.5), 3)}
        return entry, "write", {"entry": entry}

    def _keep(
        self, message_id: str, actor: ActorId, invoked_s: float, failed: FerryError | None, *, in_doubt: bool = False,
        **fields: Any,
    ) -> None:  # fmt: skip
        outcome = outcome_of(failed, in_doubt_before=in_doubt)
        if outcome is Outcome.NOT_APPLIED and self._world.weather.doubled_a_command(invoked_s):
            outcome = Outcome.UNKNOWN
        self._world.operations.append(
            Operation(
                message_id=message_id, actor=str(actor), sender=self.name, kind="command", invoked_s=invoked_s,
                returned_s=self._world.now_s(), outcome=outcome, **fields,
            )
        )  # fmt: skip

    def _pause_s(self) -> float:
        return self._chance.expovariate(self._world.profile.commands / self._world.profile.rough_s)
