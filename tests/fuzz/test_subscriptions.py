"""Garbage on every subject a process listens to: counted, logged, answered, and nobody stops listening.

Each test keeps one cluster up and throws example after example at it; every example ends with all of it serving.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from routing import control, errors
from routing.address import ActorId
from routing.control import COORDINATOR, MigrationRequest, StepRequest
from routing.documents import decode_ownership, encode_ownership
from routing.envelope import Answer, Command, decode_answer, decode_command, encode_answer, encode_command
from routing.errors import FerryError, HandlerFailed, InDoubt, InvalidInput, Unavailable
from routing.lease import decode_lease
from routing.link import Message
from routing.membership import Member, NodeState, member_of
from routing.shard_map import Ownership
from routing.subjects import actor_of_key, kv_subject, shard_of_key
from tests.fuzz.effort import fuzz
from tests.fuzz.refusals import assert_orderly
from tests.fuzz.scene import Scene
from tests.fuzz.strategies import JSON, LEASES, garbage, valid
from tests.fuzz.tally import TALLY
from tests.fuzz.test_transfer import CHUNKS

STEP_VERBS = ["pause", "capture", "serialize", "send", "await_ack", "commit", "resume", "verify", "activate"]
NODE_VERBS = [*STEP_VERBS, "stage", "inventory", "status", "no_such_verb"]  # not `drain`: it takes any object
DESK_VERBS = ["status", "plan", "migrate", "cancel", "suspend", "no_such_verb"]


@pytest.fixture
def scene() -> Iterator[Scene]:
    with Scene() as scene:
        yield scene


def refused(read: Any, *arguments: Any, **options: Any) -> bool:
    try:
        read(*arguments, **options)
    except InvalidInput as error:
        TALLY.refused(error)
        return True
    TALLY.read += 1
    return False


# -- a node ------------------------------------------------------------------------------------------------------------
def test_garbage_for_an_actor_is_counted_and_answered_and_the_node_serves_on(scene: Scene) -> None:
    """What is no command is counted as malformed, and its sender is told so: it must not wait for its deadline."""

    @fuzz
    @given(garbage(valid(Command).map(encode_command)), st.sampled_from(["a", "b"]))
    def run(payload: bytes, node: str) -> None:
        TALLY.tried("commands at a node")
        scene.run(example(payload, node))

    async def example(payload: bytes, node: str) -> None:
        before = scene.malformed()[node]
        answer = await scene.post(scene.small.subjects.command(node, "fuzz"), payload)
        if refused(decode_command, payload, max_bytes=scene.small.settings.max_command_bytes):
            assert scene.malformed()[node] == before + 1
            assert answer is not None
            error = decode_answer(answer.payload).error
            assert isinstance(error, InvalidInput)
            assert_orderly(error)
        await scene.assert_serving()

    run()


@pytest.mark.parametrize("levels", [100, 122, 123, 124, 125, 126, 127, 128, 251, 252, 500])
def test_a_command_of_any_depth_is_decided_and_the_node_serves_on(scene: Scene, levels: int) -> None:
    """What is let in can be journalled, answered and forwarded: a depth that could not would end the node.

    The handler puts the value into an event, the event into the state, the state into a reply, each a level deeper.
    """

    async def example() -> None:
        command = encode_command(scene.small.command("deep", "write", f"depth-{levels}", entry="here"))
        payload = command.replace(b'"here"', b"[" * levels + b"]" * levels)
        answer = await scene.post(scene.small.subjects.command("a", "fuzz"), payload)
        assert answer is not None
        told = decode_answer(answer.payload)
        assert told.value == 1 or isinstance(told.error, (InvalidInput, HandlerFailed))
        assert len(await scene.small.send("deep", "read")) == (told.value or 0)
        await scene.assert_serving()

    scene.run(example())


def test_garbage_instead_of_a_verb_is_counted_and_answered_and_the_node_serves_on(scene: Scene) -> None:
    """Steps of moves, announcements and questions: what cannot be read is refused before anything is looked at."""
    requests = st.one_of(valid(StepRequest), valid(MigrationRequest)).map(control.encode)

    @fuzz
    @given(garbage(requests), st.sampled_from(NODE_VERBS))
    def run(payload: bytes, verb: str) -> None:
        TALLY.tried("verbs at a node")
        scene.run(example(payload, verb))

    async def example(payload: bytes, verb: str) -> None:
        before = scene.malformed()["a"]
        answer = await scene.post(scene.small.subjects.control("a", verb), payload)
        others = {"stage": control.read_migration_request, "inventory": control.read_inventory_request}
        read: Any = (dict.fromkeys(STEP_VERBS, control.read_step_request) | others).get(verb, control.decode)
        if refused(read, payload) or verb == "no_such_verb":
            assert scene.malformed()["a"] == before + 1
            assert answer is not None
            with pytest.raises(InvalidInput) as raised:
                control.result_of(answer.payload)
            assert_orderly(raised.value)
        await scene.assert_serving()

    run()


def test_garbage_instead_of_state_is_counted_and_the_node_serves_on(scene: Scene) -> None:
    """Chunks nobody announced, and what is no chunk at all; also such as want no answer."""

    @fuzz
    @given(garbage(st.sampled_from(CHUNKS)), st.booleans())
    def run(payload: bytes, wants_answer: bool) -> None:
        TALLY.tried("chunks at a node")
        scene.run(example(payload, wants_answer))

    async def example(payload: bytes, wants_answer: bool) -> None:
        subject, before = scene.small.subjects.transfer("b", "m1"), scene.malformed()["b"]
        if not wants_answer:
            await scene.link.publish(subject, payload)
        else:
            answer = await scene.post(subject, payload)
            assert answer is not None
            with pytest.raises((InvalidInput, Unavailable)) as raised:
                control.result_of(answer.payload)
            assert_orderly(raised.value)
            assert scene.malformed()["b"] == before + isinstance(raised.value, InvalidInput)
        await scene.assert_serving()

    run()


def test_a_destination_that_answers_garbage_ends_the_step_and_not_the_source(scene: Scene) -> None:
    """A source in the middle of a move reads what its destination answers; it can be refused, never fatal."""
    answers = [control.encode_result(Unavailable("nothing is copied ahead"))]

    def reply(message: Message) -> None:
        scene.coordinator._run_aside(scene.link.publish(message.reply, answers[0]))

    async def move_begins() -> StepRequest:
        for place in ("ctl.z.*", "xfer.z.*"):
            await scene.link.subscribe(f"ferry.{scene.small.settings.cluster}.{place}", reply)
        request = await scene.small.lock("m1", "z", scene.small.directory.unit_of(ActorId("ledger", "k")))
        await scene.small.steps(request, until_verb="serialize")
        return request

    async def example(request: StepRequest, payload: bytes) -> None:
        answers[:] = [payload]
        try:
            await scene.ask("a", "send", request)
            await scene.ask("a", "await_ack", request)
        except FerryError as error:
            TALLY.refused(error)
            outcomes.add("refused")
        else:
            TALLY.read += 1
            outcomes.add("went on")
        node = scene.small.nodes["a"]
        assert not node.task.done()
        assert (await scene.ask("a", "status"))["paused"] == [request.unit]

    outcomes = set[str]()
    request = scene.run(move_begins())
    result = st.builds(lambda name, value: {name: value}, st.sampled_from(["lacking", "actors", "ok"]), JSON)
    right = {"actors": 1, "incarnation": "z1"}
    lacking = st.lists(st.just(0), max_size=2).map(lambda indexes: right | {"lacking": indexes})

    @fuzz
    @given(garbage((result | lacking | lacking).map(control.encode_result)))
    def run(payload: bytes) -> None:
        TALLY.tried("answers to a source")
        scene.run(example(request, payload))

    run()

    assert outcomes == {"refused", "went on"}
    scene.run(scene.small.abort("m1", request.unit))
    scene.run(scene.assert_serving())


# -- the coordinator ---------------------------------------------------------------------------------------------------
def test_garbage_instead_of_a_question_is_counted_and_the_coordinator_leads_on(scene: Scene) -> None:
    """Also requests that are well-formed JSON and ask for shards, nodes and plans that there are not."""
    fields = st.sampled_from(["shard", "destination", "plan", "x"])
    asked = st.dictionaries(fields, JSON | st.sampled_from(["a", "b", 0, 1]))

    @fuzz
    @given(garbage(asked.map(orjson.dumps)), st.sampled_from(DESK_VERBS))
    def run(payload: bytes, verb: str) -> None:
        TALLY.tried("questions at the coordinator")
        scene.run(example(payload, verb))

    async def example(payload: bytes, verb: str) -> None:
        before = scene.malformed()["c"]
        answer = await scene.post(scene.small.subjects.control(COORDINATOR, verb), payload)
        assert answer is not None
        reported = orjson.loads(answer.payload).get("error")
        if reported is not None:
            assert_orderly(errors.from_wire(reported))
            assert scene.malformed()["c"] == before + (reported["kind"] == "InvalidInput")
        if refused(control.decode, payload):
            assert scene.malformed()["c"] == before + 1
        await scene.assert_serving()

    run()


def test_a_node_that_answers_garbage_has_no_inventory_and_the_coordinator_leads_on(scene: Scene) -> None:
    """A plan is made without what cannot be read; its actors are found when their shard is captured."""
    answers: list[bytes] = []
    member = Member(
        id="z", incarnation="z1", state=NodeState.UP, weight=1.0, role="", types=("ledger",), host="", pid=1,
        version="",
    )  # fmt: skip

    def reply(message: Message) -> None:
        scene.coordinator._run_aside(scene.link.publish(message.reply, answers[0]))

    scene.run(scene.link.subscribe(scene.small.subjects.control("z", "inventory"), reply))
    rows = st.lists(st.tuples(st.sampled_from(["ledger/k", "x"]), JSON).map(list), max_size=2)
    inventories = st.dictionaries(st.sampled_from(["shard.0", "shard.1", "actor.t=k", "actor.", "x"]), rows, max_size=2)

    @fuzz
    @given(garbage(inventories.map(lambda units: control.encode_result({"units": units}))))
    def run(payload: bytes) -> None:
        TALLY.tried("inventories at the coordinator")
        answers[:] = [payload]
        scene.run(example())

    async def example() -> None:
        before = scene.malformed()["c"]
        found = (await scene.coordinator.inventories({"z": member}))["z"]
        for unit, actors in found.items():
            assert shard_of_key(unit) is not None or actor_of_key(unit) is not None
            assert all(str(ActorId.parse(actor)) == actor and size >= 0 for actor, size in actors)
        assert found == {} or scene.malformed()["c"] == before
        await scene.assert_serving()

    run()


# -- the buckets -------------------------------------------------------------------------------------------------------
def test_garbage_in_the_map_is_counted_by_everybody_and_what_was_known_stays(scene: Scene) -> None:
    """Keys of shards and actors of this cluster, and some that only look like one.

    Service goes on by the last value that could be read. What somebody puts right again is followed: nothing has to be
    restarted.
    """

    keys = st.sampled_from(["shard.0", "shard.1", "shard.x", "shard.9", "actor.t=k", "actor.t", "actor.t==80"])

    @fuzz
    @given(garbage(valid(Ownership).map(encode_ownership)), keys)
    def run(payload: bytes, key: str) -> None:
        assume(refused(decode_ownership, payload))  # what can be read is a change of owner, however odd
        TALLY.tried("values in the map")
        scene.run(example(payload, key))

    async def example(payload: bytes, key: str) -> None:
        before, known = scene.malformed(), scene.small.directory.get(key)
        subject = kv_subject(scene.small.subjects.map_bucket, key)
        await scene.link.append(subject, payload, expected=None, timeout_s=2.0)
        await scene.settled()
        counted = {name: count - before[name] for name, count in scene.malformed().items()}
        assert counted == dict.fromkeys(counted, 1 if key in ("shard.0", "shard.1", "actor.t=k") else 0)
        await scene.assert_serving()
        if known is not None:
            await scene.link.append(subject, encode_ownership(known.ownership), expected=None, timeout_s=2.0)
            await scene.small.directory.refresh(key)
        await scene.assert_serving()

    run()


def test_garbage_among_the_leases_is_counted_and_the_holders_keep_theirs(scene: Scene) -> None:
    """Also over the leases of living nodes and of the leader: what nobody can read is nobody's; its place is taken."""
    keys = st.sampled_from(["node.z", "node.a", "node.b", "leader", "node.", "node.a.b", "other"])

    @fuzz
    @given(garbage(LEASES.map(orjson.dumps)), keys)
    def run(payload: bytes, key: str) -> None:
        assume(refused(decode_lease if key != "node.z" else lambda it: member_of("z", decode_lease(it)), payload))
        TALLY.tried("leases")
        scene.run(example(payload, key))

    async def example(payload: bytes, key: str) -> None:
        before = scene.malformed()
        subject = kv_subject(scene.small.subjects.lease_bucket, key)
        await scene.link.append(subject, payload, expected=None, timeout_s=2.0)
        await scene.settled()
        counted = {name: count - before[name] for name, count in scene.malformed().items()}
        assert counted == dict.fromkeys(counted, 1)
        await asyncio.sleep(scene.small.settings.node_lease_s)  # every holder has renewed since
        await scene.assert_serving()

    run()


@pytest.mark.parametrize(
    ("subject", "said"),
    [
        ("cmd.a.fuzz", "command refused"), ("ctl.a.pause", "refused"), ("xfer.a.m1", "chunk refused"),
        ("ctl._coordinator.cancel", "refused"), ("map/shard.0", "map value ignored"),
        ("leases/node.z", "lease ignored"),
    ],
)  # fmt: skip
def test_every_refusal_is_in_the_log_with_its_reason(scene: Scene, subject: str, said: str) -> None:
    """Counted is not enough: whoever looks for the sender needs the subject or key, and what was wrong."""

    async def rubbish() -> None:
        bucket, _, key = subject.rpartition("/")
        if bucket:
            place = f"$KV.ferry-{scene.small.settings.cluster}-{bucket}.{key}"
            await scene.link.append(place, b"rubbish", expected=None, timeout_s=2.0)
        else:
            await scene.link.publish(f"ferry.{scene.small.settings.cluster}.{subject}", b"rubbish")
        await scene.settled()

    with capture_logs() as lines:
        scene.run(rubbish())

    assert {"JSON" in line["error"] for line in lines if line["event"] == said} == {True}


# -- a client ----------------------------------------------------------------------------------------------------------
def test_garbage_instead_of_an_answer_is_doubt_and_the_client_goes_on(scene: Scene) -> None:
    """A command whose answers cannot be read may have been applied: never a plain refusal, never a foreign error."""
    answers = [control.encode_result(Unavailable("nothing is copied ahead"))]

    def reply(message: Message) -> None:
        scene.coordinator._run_aside(scene.link.publish(message.reply, answers[0]))

    unit = scene.small.directory.unit_of(ActorId("ledger", "elsewhere"))
    assert unit != scene.small.directory.unit_of(ActorId("ledger", "k"))

    async def somebody_else_owns_it() -> None:
        scene.coordinator._hold_failover(1e9)  # it has no lease, and keeps the shard for this test all the same
        await scene.small.fail_over("z", unit)
        await scene.link.subscribe(scene.small.subjects.command("z", "*"), reply)

    outcomes = set[str]()
    scene.run(somebody_else_owns_it())

    @fuzz
    @given(garbage(valid(Answer).map(encode_answer)))
    def run(payload: bytes) -> None:
        TALLY.tried("answers to a client")
        answers[:] = [payload]
        scene.run(example(payload))

    async def example(payload: bytes) -> None:
        unreadable = refused(decode_answer, payload)
        sending = scene.small.send("elsewhere", "write", entry=1, timeout_s=0.05)
        outcome: Any = (await asyncio.gather(sending, return_exceptions=True))[0]
        if unreadable:
            assert isinstance(outcome, InDoubt)
            outcomes.add("in doubt")
        else:
            assert isinstance(outcome, FerryError) or not isinstance(outcome, BaseException)
            outcomes.add("an error" if isinstance(outcome, FerryError) else "answered")
        scene.small.router._learned.clear()  # what a well-formed answer says of the owner is believed
        await scene.assert_serving()

    run()

    assert outcomes == {"in doubt", "an error", "answered"}
