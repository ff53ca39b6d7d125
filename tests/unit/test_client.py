"""What an application imports: handles, plain calls, and the blocking twin."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any, cast

import pytest

from routing.address import ActorId
from routing.client import Cluster, SyncCluster, SyncSession
from routing.errors import HandlerFailed, InDoubt, InvalidInput, Rejected, Unavailable, UnknownActorType, UnknownCommand
from routing.link import Link
from routing.session import Session
from runtime.testing import MemoryNats
from tests.unit.cluster import cluster
from tests.unit.virtual_time import virtually


def client_of(nats: MemoryNats, name: str = "default") -> Cluster:
    async def open_link() -> Link:
        return nats.link("client")

    return Cluster(open_link, cluster=name)


@virtually
async def test_a_handles_methods_are_the_actors_commands_and_queries() -> None:
    """The contract's example."""
    async with cluster("a") as small, client_of(small.nats) as client:
        ledger = client.actor("ledger", "k")

        assert await ledger.write(entry="one") == 1
        assert await ledger.read() == ["one"]


@virtually
async def test_a_message_is_sent_by_address_name_and_id() -> None:
    """The same id again: applied once, the same reply."""
    async with cluster("a") as small, client_of(small.nats) as client:
        first = await client.send_message("ledger/k", "write", {"entry": 1}, message_id="m-1", timeout=5.0)
        again = await client.send_message("ledger/k", "write", {"entry": 1}, message_id="m-1", timeout=5.0)

        assert (first, again) == (1, 1)
        assert await client.actor("ledger", "k").read() == [1]


@virtually
async def test_errors_arrive_as_what_they_are() -> None:
    """Rejected, a failed handler, an unknown command or type, wrong arguments."""
    async with cluster("a") as small, client_of(small.nats) as client:
        ledger = client.actor("ledger", "k")
        await ledger.close()

        with pytest.raises(Rejected, match="closed"):
            await ledger.write(entry=1)
        with pytest.raises(HandlerFailed, match="mistake"):
            await ledger.write_and_fail(entry=1)
        with pytest.raises(UnknownCommand):
            await ledger.no_such_thing()
        with pytest.raises(UnknownCommand):
            await ledger.written(entry=1)
        with pytest.raises(UnknownActorType):
            await client.actor("nobody", "k").write(entry=1)
        with pytest.raises(InvalidInput):
            await ledger.write(wrong=1)


@virtually
async def test_no_answer_in_time_is_in_doubt_and_asking_again_tells() -> None:
    """The append is answered too late for the caller; the command was applied once all the same."""
    async with cluster("a") as small, client_of(small.nats) as client:
        small.disturb("drop_reply", "append", ".ev.")

        with pytest.raises(InDoubt) as doubt:
            await client.send_message("ledger/k", "write", {"entry": 1}, message_id="m-1", timeout=0.5)

        assert doubt.value.message_id == "m-1"
        assert await client.send_message("ledger/k", "write", {"entry": 1}, message_id="m-1") == 1
        assert await client.actor("ledger", "k").read() == [1]
        assert small.disturbed()


@virtually
async def test_the_node_of_an_actor_is_the_maps_owner() -> None:
    """Read from the leader: true at the time of asking."""
    async with cluster("a", "b") as small, client_of(small.nats) as client:
        assert await client.get_actor_node("ledger/k") == "a"

        await small.move("m", "b")

        assert await client.get_actor_node("ledger/k") == "b"


@virtually
async def test_nobody_owns_an_actor_before_the_first_assignment() -> None:
    """None, not an error."""
    async with cluster() as small:
        await small.add("a")
        async with client_of(small.nats) as client:
            assert await client.get_actor_node("ledger/k") is None


@virtually
async def test_entering_without_such_a_cluster_is_unavailable() -> None:
    """A typo in the cluster's name shows at once."""
    async with cluster("a") as small:
        with pytest.raises(Unavailable):
            await client_of(small.nats, "elsewhere").__aenter__()


@virtually
async def test_a_malformed_actor_is_invalid_input() -> None:
    """Before anything is sent."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for actor in ("ledger", "/k", "ledger/", "Ledger/k", ""):
            with pytest.raises(InvalidInput):
                await client.send_message(actor, "read")
            with pytest.raises(InvalidInput):
                await client.get_actor_node(actor)
        with pytest.raises(InvalidInput):
            client.actor("ledger", "")


NO_TIMEOUTS = [None, "5", [], Decimal(1), float("nan"), float("inf"), 0, -1.0, 10**400, 1e300]


@virtually
async def test_what_is_no_timeout_is_invalid_input() -> None:
    """In one line, before anything is sent; for a query of an actor in the same process as well."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for timeout in cast("list[Any]", NO_TIMEOUTS):
            session = client.session()
            for asked in (
                client.send_message("ledger/k", "write", {"entry": 1}, timeout=timeout),
                session.send_message("ledger/k", "write", {"entry": 1}, timeout=timeout),
                session.query("ledger/k", "read", timeout=timeout),
                small.nodes["a"].node.router.send_message(ActorId("ledger", "k"), "read", timeout_s=timeout),
            ):
                with pytest.raises(InvalidInput, match=r"^timeout of .* s: must be a number") as refusal:
                    await asked
                assert len(str(refusal.value)) < 200

        assert await client.actor("ledger", "k").read() == []


@virtually
async def test_any_number_that_can_be_waited_is_a_timeout() -> None:
    """As it is for asyncio."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for timeout in cast("list[Any]", [1, 2.5, Fraction(1, 2), True, 1e8]):
            assert await client.send_message("ledger/k", "read", timeout=timeout) == []


@virtually
async def test_an_actor_or_a_command_that_is_no_text_is_invalid_input() -> None:
    """In one line, and not an error of Python from deep inside."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for odd in cast("list[Any]", [None, 5, b"ledger/k", ("ledger", "k"), ["ledger", "k"], {}]):
            for asked in (
                client.send_message(odd, "read"), client.get_actor_node(odd), client.send_message("ledger/k", odd),
                client.session().send_message(odd, "write"), client.session().query(odd, "read"),
            ):  # fmt: skip
                with pytest.raises(InvalidInput):
                    await asked
            for actor_type, key in ((odd, "k"), ("ledger", odd)):
                with pytest.raises(InvalidInput, match="are not both text"):
                    client.actor(actor_type, key)


@virtually
async def test_arguments_that_are_no_dict_and_ids_that_are_no_text_are_invalid_input() -> None:
    """As nodes would refuse them."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for odd in cast("list[Any]", [5, 0, False, [], [("entry", 1)], "entry", b"entry", {1: 2}, {"entry": object()}]):
            for sender in (client, client.session()):
                with pytest.raises(InvalidInput):
                    await sender.send_message("ledger/k", "write", odd)
        for odd in cast("list[Any]", [5, 0, False, b"m-1", "", "m" * 129]):
            with pytest.raises(InvalidInput):
                await client.send_message("ledger/k", "write", {"entry": 1}, message_id=odd)

        assert await client.actor("ledger", "k").read() == []


@pytest.mark.parametrize("connect", [Cluster.connect, SyncCluster.connect])
def test_what_names_no_server_or_no_cluster_is_invalid_input_at_once(connect: Any) -> None:
    """Before there is a thread or a connection."""
    for url in (
        None, 5, "", ",", ["nats://127.0.0.1:4222"], b"nats://127.0.0.1:4222", "nats://a:port", "nats://[", "nats://", "http://a",
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match="URL of NATS"):
            connect(url)
    for name in (None, 5, "", "has.dots", b"default"):
        with pytest.raises(InvalidInput, match="cluster name"):
            connect("nats://127.0.0.1:4222", cluster=name)


@virtually
async def test_a_handle_is_not_mistaken_for_something_it_is_not() -> None:
    """Python asks objects for names of its own: such a question must not become a command."""
    async with cluster("a") as small, client_of(small.nats) as client:
        ledger = client.actor("ledger", "k")

        assert not hasattr(ledger, "__len__")
        assert not hasattr(ledger, "_private")
        assert copy.copy(ledger) is not None
        assert "ledger/k" in repr(ledger)


@virtually
async def test_arguments_without_a_name_are_refused_in_words() -> None:
    """Messages carry names; the sender is told by the name of the command, before anything is sent."""
    async with cluster("a") as small, client_of(small.nats) as client:
        for sender in (client, client.session()):
            with pytest.raises(TypeError, match="write takes keyword arguments only"):
                sender.actor("ledger", "k").write("one")

        assert await client.actor("ledger", "k").read() == []


@virtually
async def test_a_client_that_was_left_says_so() -> None:
    """An error of the tree, not an AttributeError from inside."""
    async with cluster("a") as small:
        async with client_of(small.nats) as client:
            await client.actor("ledger", "k").write(entry=1)

        with pytest.raises(Unavailable):
            await client.send_message("ledger/k", "read", timeout=1.0)


@virtually
async def test_a_client_that_was_never_entered_says_so() -> None:
    """The commonest mistake gets a sentence that helps."""
    async with cluster("a") as small:
        with pytest.raises((Unavailable, InvalidInput)):
            await client_of(small.nats).send_message("ledger/k", "read", timeout=1.0)


class Background:
    """A whole cluster on the loop of a SyncCluster's own thread, in real time: it starts with the first link."""

    def __init__(self) -> None:
        self.client = SyncCluster(Cluster(self.open_link, cluster="default"))

    async def open_link(self) -> Link:
        self.loop = asyncio.get_running_loop()
        self.context = cluster("a")
        return (await self.context.__aenter__()).nats.link("client")

    @contextlib.contextmanager
    def running(self) -> Iterator[SyncCluster]:
        with self.client as client:
            yield client
            leaving = self.context.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(leaving, self.loop).result(timeout=20)


@pytest.fixture
def blocking() -> Iterator[SyncCluster]:
    with Background().running() as client:
        yield client


def test_blocking_code_calls_actors_as_well(blocking: SyncCluster) -> None:
    """The same methods without await."""
    ledger = blocking.actor("ledger", "k")

    assert ledger.write(entry="one") == 1
    assert ledger.read() == ["one"]
    assert blocking.send_message("ledger/k", "write", {"entry": "two"}, message_id="m", timeout=5.0) == 2
    assert blocking.send_message("ledger/k", "write", {"entry": "two"}, message_id="m", timeout=5.0) == 2
    assert blocking.get_actor_node("ledger/k") == "a"


def test_blocking_calls_raise_what_awaited_ones_raise(blocking: SyncCluster) -> None:
    """In the calling thread."""
    ledger = blocking.actor("ledger", "k")
    ledger.close()

    with pytest.raises(Rejected):
        ledger.write(entry=1)
    with pytest.raises(InvalidInput):
        blocking.send_message("nonsense", "read")


def test_any_thread_may_call(blocking: SyncCluster) -> None:
    """Django workers share one client: nothing lost, nothing doubled."""
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: blocking.actor("ledger", "k").write(entry=n), range(40)))

    assert sorted(blocking.actor("ledger", "k").read()) == list(range(40))


def test_a_blocking_session_orders_the_commands_of_a_thread(blocking: SyncCluster) -> None:
    """The same methods as a Session, and the same refusals."""
    session = blocking.session()
    ledger = session.actor("ledger", "k")

    assert [ledger.write(entry=n) for n in range(3)] == [1, 2, 3]
    assert session.send_message("ledger/k", "write", {"entry": 3}, timeout=5.0) == 4
    assert session.query("ledger/k", "read", linearizable=True) == [0, 1, 2, 3]
    assert session.id != blocking.session().id
    with pytest.raises(InvalidInput, match="is a query"):
        ledger.read()


def test_a_blocking_session_may_be_shared_by_threads(blocking: SyncCluster) -> None:
    """Each call has a number of its own: nothing lost, nothing doubled, and a query sees what began before it."""
    session = blocking.session()
    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(lambda n: session.actor("ledger", "k").write(entry=n), range(40)))

    assert sorted(counts) == list(range(1, 41))
    assert sorted(session.query("ledger/k", "read")) == list(range(40))


def test_a_session_has_every_method_in_blocking_form() -> None:
    """What the one gains, the other must not lack."""
    for awaited, blocking_form in ((Cluster, SyncCluster), (Session, SyncSession)):
        names = {name for name in vars(awaited) if not name.startswith("_")}
        assert names <= {name for name in vars(blocking_form) if not name.startswith("_")}
        for name in names - {"connect"}:
            first, second = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (awaited, blocking_form))
            assert first == second, name


def test_a_blocking_client_is_entered_once() -> None:
    """Its thread is used up, and while it runs a second one would leave on behalf of the first."""
    background = Background()
    with background.running() as client:
        with pytest.raises(InvalidInput, match="entered before"):
            client.__enter__()
        assert client.actor("ledger", "k").write(entry=1) == 1  # the first is not disturbed

    with pytest.raises(InvalidInput, match=r"make another one with SyncCluster\.connect"):
        background.client.__enter__()


def test_leaving_ends_the_background_thread() -> None:
    """Nothing of it keeps a process alive."""
    before = set(threading.enumerate())

    with Background().running() as client:
        client.actor("ledger", "k").read()
        assert set(threading.enumerate()) - before

    assert set(threading.enumerate()) - before == set()


def test_a_blocking_client_that_cannot_connect_leaves_no_thread() -> None:
    """Entering fails with what was wrong, in the calling thread."""
    before = set(threading.enumerate())

    async def open_link() -> Link:
        raise Unavailable("no server there")

    with pytest.raises(Unavailable, match="no server there"):
        SyncCluster(Cluster(open_link, cluster="default")).__enter__()

    assert set(threading.enumerate()) - before == set()


def test_a_blocking_client_outside_its_context_says_so() -> None:
    """It blocks for at most `timeout` seconds, and raises: a forgotten `with` must not freeze a web worker."""

    async def open_link() -> Link:
        return MemoryNats().link("client")

    outcomes: list[BaseException] = []

    def call() -> None:
        try:
            SyncCluster(Cluster(open_link, cluster="default")).send_message("ledger/k", "read", timeout=0.2)
        except Exception as error:
            outcomes.append(error)

    calling = threading.Thread(target=call, daemon=True)
    calling.start()
    calling.join(timeout=5.0)

    assert not calling.is_alive(), "blocked for ever"
    assert [isinstance(error, Unavailable | InvalidInput) for error in outcomes] == [True]
