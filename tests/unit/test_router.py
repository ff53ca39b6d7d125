"""Sending: one message id whatever happens on the way, and an honest word about the outcome."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from routing.address import ActorId
from routing.birth import found_or_join
from routing.directory import Directory
from routing.envelope import MAX_MESSAGE_ID_BYTES, Answer, Command, decode_command, encode_answer
from routing.errors import (
    Busy,
    FerryError,
    HandlerFailed,
    InDoubt,
    InvalidInput,
    Moved,
    PayloadTooLarge,
    Rejected,
    Timeout,
    Unavailable,
    UnknownCommand,
)
from routing.link import Message
from routing.local import LATER
from routing.router import Router, new_message_id
from routing.settings import Settings
from routing.shard_map import assign, bind, failover
from runtime.testing import MemoryNats
from tests.unit.virtual_time import WALL_OFFSET_S, clock, until, virtually, wall_clock

SETTINGS = Settings(shards=1)
SUBJECTS = SETTINGS.subjects
ACTOR = ActorId("cart", "7")
UNIT = "shard.0"
SILENCE = None
Script = list[Answer | None]


class Peers:
    """Nodes that answer by script, the last line of it for ever; they note what they heard, and when."""

    def __init__(self) -> None:
        self.nats = MemoryNats()
        self.heard: list[tuple[str, Command]] = []
        self.heard_at_s: list[float] = []
        self.sent: set[asyncio.Task[None]] = set()
        self.link = self.nats.link("client")
        self.directory = Directory(self.link, SUBJECTS, shards_total=1)

    async def start(self, owner: str | None = "a") -> Router:
        await found_or_join(self.link, SETTINGS)
        await self.directory.start()
        if owner is not None:
            first = await self.directory.transition(UNIT, None, assign(owner))
            await self.directory.transition(UNIT, first, bind(first.ownership, node=owner, incarnation=f"{owner}-1"))
        return Router(self.link, self.directory, SUBJECTS, sender="client", wall_clock=wall_clock)

    async def node(self, name: str, script: Script) -> None:
        link = self.nats.link(name)
        lines = iter(script)
        last: list[Answer | None] = [SILENCE]

        def answer(message: Message) -> None:
            self.heard.append((name, decode_command(message.payload, max_bytes=10**6)))
            self.heard_at_s.append(clock())
            last[0] = next(lines, last[0])
            if last[0] is not SILENCE:
                self.sent.add(asyncio.create_task(link.publish(message.reply, encode_answer(last[0]))))

        await link.subscribe(SUBJECTS.command(name, "client"), answer)

    @property
    def ids(self) -> set[str]:
        return {command.message_id for _, command in self.heard}

    @property
    def asked(self) -> list[str]:
        return [name for name, _ in self.heard]


def moved(owner: str | None, epoch: int) -> Answer:
    return Answer(error=Moved("elsewhere", owner=owner, epoch=epoch), owner=owner, epoch=epoch)


DONE = Answer(value="done", owner="a", epoch=1)
BUSY = Answer(error=Busy("full", retry_after_s=0.1), owner="a", epoch=1)


@virtually
async def test_a_command_reaches_the_owner_and_its_reply_the_caller() -> None:
    """With its arguments, an id, the epoch the sender went by, and the time after which nobody waits."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [DONE])

    assert await router.send_message(ACTOR, "add", {"item": "tea"}, timeout_s=7.0) == "done"

    [(_, command)] = peers.heard
    assert (command.actor, command.name, command.arguments) == (ACTOR, "add", {"item": "tea"})
    assert command.message_id
    assert (command.epoch, command.hops) == (1, 0)
    assert command.expires_ms == pytest.approx((WALL_OFFSET_S + 1007.0) * 1000, abs=50)


@virtually
async def test_everything_is_retried_under_one_message_id() -> None:
    """Busy, then silence, then the reply: three attempts, one command."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [BUSY, SILENCE, DONE])

    assert await router.send_message(ACTOR, "add", message_id="m-1") == "done"

    assert len(peers.heard) == 3
    assert peers.ids == {"m-1"}


@virtually
async def test_the_id_made_up_for_a_command_is_kept_over_its_retries() -> None:
    """Also when the caller gave none; the next command gets another."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [BUSY, BUSY, DONE])

    await router.send_message(ACTOR, "add")
    assert len(peers.ids) == 1
    await router.send_message(ACTOR, "add")

    assert len(peers.ids) == 2


@virtually
async def test_retries_come_after_the_time_the_receiver_asked_for() -> None:
    """A full node is not hammered."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [Answer(error=Busy("full", retry_after_s=1.5), owner="a", epoch=1), DONE])

    await router.send_message(ACTOR, "add")

    first_s, second_s = peers.heard_at_s
    assert second_s - first_s >= 1.4


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Rejected("no"), Rejected),
        (HandlerFailed("raised"), HandlerFailed),
        (InvalidInput("wrong"), InvalidInput),
        (UnknownCommand("what?"), UnknownCommand),
    ],
)
def test_a_decision_of_the_node_is_final(error: FerryError, kind: type[FerryError]) -> None:
    """Raised as what it was, after one attempt."""

    @virtually
    async def check() -> None:
        peers = Peers()
        router = await peers.start()
        await peers.node("a", [Answer(error=error, owner="a", epoch=1)])

        with pytest.raises(kind, match=str(error).replace("?", r"\?")) as refusal:
            await router.send_message(ACTOR, "add")

        assert type(refusal.value) is kind
        assert len(peers.heard) == 1

    check()


@virtually
async def test_silence_until_the_deadline_leaves_the_outcome_in_doubt() -> None:
    """The request may have arrived and been applied: the id to ask with is in the error."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [SILENCE])
    began_s = clock()

    with pytest.raises(InDoubt) as doubt:
        await router.send_message(ACTOR, "add", message_id="m-1", timeout_s=5.0)

    assert doubt.value.message_id == "m-1"
    assert clock() - began_s == pytest.approx(5.0, abs=0.3)


@virtually
async def test_nobody_reached_at_all_is_unavailable() -> None:
    """Surely not applied, and nobody there: neither InDoubt nor Timeout."""
    peers = Peers()
    router = await peers.start()

    with pytest.raises(Unavailable):
        await router.send_message(ACTOR, "add", timeout_s=3.0)


@virtually
async def test_refused_until_the_deadline_is_a_timeout() -> None:
    """Every attempt was answered with "later": surely not applied."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [BUSY])

    with pytest.raises(Timeout):
        await router.send_message(ACTOR, "add", timeout_s=3.0)


@pytest.mark.parametrize("then", [[BUSY], [moved("nobody-there", 5)], [moved(None, 5)]])
def test_one_silent_attempt_leaves_a_doubt_that_no_refusal_removes(then: Script) -> None:
    """The unanswered one may still be waiting somewhere: Timeout or Unavailable would be a lie."""

    @virtually
    async def check() -> None:
        peers = Peers()
        router = await peers.start()
        await peers.node("a", [SILENCE, *then])

        with pytest.raises(InDoubt):
            await router.send_message(ACTOR, "add", message_id="m-1", timeout_s=6.0)

    check()


@virtually
async def test_a_doubt_ends_with_the_answer_to_the_same_id() -> None:
    """A decision under that id is the outcome, whichever attempt it answers."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [SILENCE, Answer(error=Rejected("no"), owner="a", epoch=1)])

    with pytest.raises(Rejected):
        await router.send_message(ACTOR, "add", timeout_s=6.0)


@virtually
async def test_a_damaged_answer_leaves_the_outcome_in_doubt() -> None:
    """It may have been applied: garbage is not a refusal, and never a ValueError in the caller's face."""
    peers = Peers()
    router = await peers.start()
    link = peers.nats.link("a")
    tasks = set()

    def answer(message: Message) -> None:
        tasks.add(asyncio.create_task(link.publish(message.reply, b"garbage")))

    await link.subscribe(SUBJECTS.command("a", "client"), answer)

    with pytest.raises((InDoubt, InvalidInput)):
        await router.send_message(ACTOR, "add", timeout_s=3.0)


@virtually
async def test_moved_corrects_the_route() -> None:
    """The command follows, under its id and with the epoch it was told; the next one goes straight there."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [moved("b", 3)])
    await peers.node("b", [Answer(value="done", owner="b", epoch=3)])

    assert await router.send_message(ACTOR, "add", message_id="m-1") == "done"
    assert peers.asked == ["a", "b"]
    assert peers.ids == {"m-1"}
    assert peers.heard[-1][1].epoch == 3

    await router.send_message(ACTOR, "add")
    assert peers.asked == ["a", "b", "b"]


@virtually
async def test_a_higher_epoch_in_an_answer_corrects_the_route_for_the_next_command() -> None:
    """It was forwarded and answered by the new owner: no second detour."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [Answer(value="forwarded", owner="b", epoch=4)])
    await peers.node("b", [Answer(value="direct", owner="b", epoch=4)])

    assert await router.send_message(ACTOR, "add") == "forwarded"
    assert await router.send_message(ACTOR, "add") == "direct"


@virtually
async def test_an_older_word_does_not_take_a_route_back() -> None:
    """Routes only ever go to higher epochs: a node with a stale view is not believed."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [Answer(value="forwarded", owner="b", epoch=5)])
    await peers.node("b", [moved("a", 3), Answer(value="direct", owner="b", epoch=5)])
    await router.send_message(ACTOR, "add")

    assert await router.send_message(ACTOR, "add") == "direct"

    assert peers.asked == ["a", "b", "b"]


@virtually
async def test_nodes_that_point_at_each_other_are_not_asked_in_a_hot_loop() -> None:
    """A forwarding loop ends at the deadline, having cost few messages, and surely nothing was applied."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [moved("b", 3)])
    await peers.node("b", [moved("a", 3)])

    with pytest.raises(Timeout):
        await router.send_message(ACTOR, "add", timeout_s=3.0)

    assert len(peers.heard) < 100


@virtually
async def test_the_map_overtakes_what_an_answer_said() -> None:
    """A later owner in the map wins over an earlier correction."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [moved("b", 2)])
    await peers.node("b", [Answer(value="b", owner="b", epoch=2)])
    await peers.node("c", [Answer(value="c", owner="c", epoch=2)])
    assert await router.send_message(ACTOR, "add") == "b"

    for owner in ("b", "c"):
        entry = peers.directory.get(UNIT)
        assert entry is not None
        await peers.directory.transition(UNIT, entry, failover(entry.ownership, to=owner))

    assert await router.send_message(ACTOR, "add") == "c"


@virtually
async def test_a_command_waits_for_the_first_owner() -> None:
    """A cluster that is just being born is not an error yet."""
    peers = Peers()
    router = await peers.start(owner=None)
    await peers.node("a", [DONE])
    sending = asyncio.create_task(router.send_message(ACTOR, "add", timeout_s=5.0))
    await asyncio.sleep(1)

    await peers.directory.transition(UNIT, None, assign("a"))

    assert await sending == "done"


@virtually
async def test_without_any_owner_it_is_unavailable() -> None:
    """At the deadline, not before: somebody might come."""
    peers = Peers()
    router = await peers.start(owner=None)
    began_s = clock()

    with pytest.raises(Unavailable):
        await router.send_message(ACTOR, "add", timeout_s=3.0)

    assert clock() - began_s == pytest.approx(3.0, abs=0.3)


@virtually
async def test_a_link_that_is_down_and_heals_costs_only_time() -> None:
    """Publishing into a dead link fails at once; trying goes on within the deadline."""
    peers = Peers()
    router = await peers.start("a")
    await peers.node("a", [DONE])
    peers.link.disconnect()
    sending = asyncio.create_task(router.send_message(ACTOR, "add", timeout_s=10.0))
    await asyncio.sleep(2)

    peers.link.reconnect()

    assert await sending == "done"


@pytest.mark.parametrize("message_id", ["", "x" * (MAX_MESSAGE_ID_BYTES + 1), "ä" * (MAX_MESSAGE_ID_BYTES // 2 + 1)])
def test_a_malformed_message_id_is_refused_before_sending(message_id: str) -> None:
    """An empty id would make all commands one."""

    @virtually
    async def check() -> None:
        peers = Peers()
        router = await peers.start()
        await peers.node("a", [DONE])

        with pytest.raises(InvalidInput):
            await router.send_message(ACTOR, "add", message_id=message_id, timeout_s=1.0)

        assert peers.heard == []

    check()


@virtually
async def test_what_cannot_be_sent_is_refused_before_sending() -> None:
    """Arguments that are not JSON-like, or too large: the caller's mistake, told at once."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [DONE])

    with pytest.raises(InvalidInput):
        await router.send_message(ACTOR, "add", {"x": object()})
    with pytest.raises(PayloadTooLarge):
        await router.send_message(ACTOR, "add", {"x": "y" * 600_000})

    assert peers.heard == []


@virtually
async def test_cancelling_the_caller_cancels_the_sending() -> None:
    """CancelledError always rises, and nothing is sent any more."""
    peers = Peers()
    router = await peers.start()
    await peers.node("a", [BUSY])
    sending = asyncio.create_task(router.send_message(ACTOR, "add"))
    await until(lambda: peers.heard)

    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    sent = len(peers.heard)
    await asyncio.sleep(3)

    assert len(peers.heard) == sent


@virtually
async def test_two_hundred_callers_share_one_router() -> None:
    """Each gets the reply to its own command."""
    peers = Peers()
    router = await peers.start()
    link = peers.nats.link("a")
    tasks = set()

    def echo(message: Message) -> None:
        command = decode_command(message.payload, max_bytes=10**6)
        answer = Answer(value=command.arguments["n"], owner="a", epoch=1)
        tasks.add(asyncio.create_task(link.publish(message.reply, encode_answer(answer))))

    await link.subscribe(SUBJECTS.command("a", "client"), echo)

    replies = await asyncio.gather(*(router.send_message(ACTOR, "add", {"n": n}) for n in range(200)))

    assert replies == list(range(200))


class Here:
    """The actor host of this very process."""

    def __init__(self, answer: Callable[[Command], Awaitable[Answer]]) -> None:
        self.answer = answer
        self.now: Any = LATER
        self.asked: list[Command] = []

    def serves(self, unit: str) -> bool:
        return unit == UNIT

    def query_at_once(self, actor: ActorId, name: str, arguments: dict[str, Any]) -> Any:
        if isinstance(self.now, FerryError):
            raise self.now
        return self.now

    def ask(self, command: Command) -> Awaitable[Answer]:
        self.asked.append(command)
        return self.answer(command)


async def local_router(answer: Callable[[Command], Awaitable[Answer]]) -> tuple[Peers, Here, Router]:
    peers = Peers()
    await peers.start()
    await peers.node("a", [Answer(value="by the network", owner="a", epoch=1)])
    here = Here(answer)
    router = Router(peers.link, peers.directory, SUBJECTS, sender="a", local=here, wall_clock=wall_clock)
    return peers, here, router


@virtually
async def test_a_local_actor_is_asked_without_the_network() -> None:
    """Straight into the mailbox; the rest is the same."""

    async def answer(command: Command) -> Answer:
        return Answer(value=command.arguments["n"] + 1, owner="a", epoch=1)

    peers, here, router = await local_router(answer)

    assert await router.send_message(ACTOR, "add", {"n": 1}, message_id="m-1") == 2

    assert peers.heard == []
    assert [command.message_id for command in here.asked] == ["m-1"]


@virtually
async def test_a_local_answer_that_is_there_at_once_is_taken_and_others_get_their_turn() -> None:
    """It needs no wait; a caller that asks in a loop must not keep the process from everything else."""

    async def answer(_command: Command) -> Answer:
        raise AssertionError

    _, here, router = await local_router(answer)
    here.now = [1]
    asked = 0

    async def ask_for_ever() -> None:
        nonlocal asked
        while True:
            assert await router.send_message(ACTOR, "add") == [1]
            asked += 1

    asking = asyncio.create_task(ask_for_ever())
    for _ in range(3):
        await asyncio.sleep(0)

    assert asked > 0
    asking.cancel()


@virtually
async def test_a_local_actor_that_never_answers_leaves_a_doubt_at_the_deadline() -> None:
    """The same words for the same outcome, local or remote."""

    async def answer(_command: Command) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    _, _, router = await local_router(answer)
    began_s = clock()

    with pytest.raises(InDoubt):
        await router.send_message(ACTOR, "add", timeout_s=4.0)

    assert clock() - began_s == pytest.approx(4.0, abs=0.3)


@virtually
async def test_a_local_refusal_is_raised_as_what_it_is() -> None:
    """And a local Busy is retried under the same id."""
    answers = iter([BUSY, Answer(error=Rejected("no"), owner="a", epoch=1)])

    async def answer(_command: Command) -> Answer:
        return next(answers)

    _, here, router = await local_router(answer)

    with pytest.raises(Rejected):
        await router.send_message(ACTOR, "add")

    assert len({command.message_id for command in here.asked}) == 1


@virtually
async def test_a_refusal_that_is_there_at_once_is_raised_as_the_network_would_have_brought_it() -> None:
    """One caller's changes to it are not another's."""

    async def answer(_command: Command) -> Answer:
        raise AssertionError

    _, here, router = await local_router(answer)
    here.now = Rejected("no")

    with pytest.raises(Rejected, match="no") as caught:
        await router.send_message(ACTOR, "add")

    assert caught.value is not here.now


@virtually
@pytest.mark.parametrize(
    "sent", [{"name": []}, {"name": "x" * 201}, {"arguments": []}, {"message_id": ""}, {"timeout_s": 0.0},
             {"timeout_s": float("nan")}],
)  # fmt: skip
async def test_what_no_other_node_could_receive_is_refused_even_where_an_answer_is_there_at_once(
    sent: dict[str, Any],
) -> None:
    """The short way to an actor that is here must not take what the long one refuses."""

    async def answer(_command: Command) -> Answer:
        return Answer(value=None, owner="a", epoch=1)

    _, here, router = await local_router(answer)
    here.now = [1] if "name" not in sent else LATER

    with pytest.raises(InvalidInput):
        await router.send_message(**{"actor": ACTOR, "name": "add", **sent})

    assert here.asked == []


@virtually
async def test_arguments_that_no_other_node_could_receive_are_refused_locally_too() -> None:
    """A program that works on one node must not break when the actor moves away."""

    async def answer(_command: Command) -> Answer:
        return Answer(value=None, owner="a", epoch=1)

    _, here, router = await local_router(answer)

    for value in (object(), {1: 2}, {1, 2}, b"bytes"):
        with pytest.raises(InvalidInput):
            await router.send_message(ACTOR, "add", {"x": value})

    assert here.asked == []


@virtually
async def test_a_local_caller_cannot_reach_into_the_actor_through_its_arguments() -> None:
    """What the actor got and what the caller holds are never one object, local or remote."""
    got: list[Any] = []

    async def answer(command: Command) -> Answer:
        got.append(command.arguments)
        return Answer(value=None, owner="a", epoch=1)

    _, _, router = await local_router(answer)
    arguments = {"items": ["tea"]}

    await router.send_message(ACTOR, "add", arguments)
    arguments["items"].append("milk")

    assert got == [{"items": ["tea"]}]


@virtually
async def test_a_local_caller_cannot_reach_into_the_actor_through_its_reply() -> None:
    """The actor remembers its answers: a caller that changes its own must not change what a repeated one gets."""
    remembered = {"items": ["tea"]}

    async def answer(_command: Command) -> Answer:
        return Answer(value=remembered, owner="a", epoch=1)

    _, _, router = await local_router(answer)

    reply = await router.send_message(ACTOR, "add")
    reply["items"].append("milk")

    assert remembered == {"items": ["tea"]}


@virtually
async def test_a_command_too_large_for_another_node_is_refused_locally_too() -> None:
    """The limit is the cluster's, not the network's."""

    async def answer(_command: Command) -> Answer:
        return Answer(value=None, owner="a", epoch=1)

    _, here, router = await local_router(answer)

    with pytest.raises(PayloadTooLarge):
        await router.send_message(ACTOR, "add", {"x": "y" * 600_000})

    assert here.asked == []


@pytest.mark.parametrize("timeout_s", [0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_no_deadline_is_refused(timeout_s: float) -> None:
    """Every wait has a deadline."""

    @virtually
    async def check() -> None:
        router = await Peers().start()
        with pytest.raises(InvalidInput):
            await router.send_message(ACTOR, "add", timeout_s=timeout_s)

    check()


def test_message_ids_do_not_repeat() -> None:
    """96 random bits each."""
    assert len({new_message_id() for _ in range(10_000)}) == 10_000


def test_a_forked_process_has_message_ids_of_its_own() -> None:
    """Celery forks its workers: two that began with one generator would send different commands under one id."""
    new_message_id()
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as child:
        theirs = child.submit(_ids, 100)
        ours = _ids(100)

        assert not set(ours) & set(theirs.result(timeout=60))


def test_seeding_the_shared_generator_does_not_repeat_message_ids() -> None:
    """An application that wants repeatable chance does not want repeated commands."""
    random.seed(1)
    first = _ids(10)
    random.seed(1)

    assert not set(first) & set(_ids(10))


def _ids(count: int) -> list[str]:
    return [new_message_id() for _ in range(count)]
