"""docs/actors.md: its code runs, and what it says of limits, state and newer classes is so."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from routing.address import ActorId
from routing.client import Cluster
from routing.errors import HandlerFailed, PayloadTooLarge, Rejected, StateNotPortable
from routing.link import Link
from routing.settings import Settings
from runtime.actor import Actor
from runtime.codec import capture_state, restore_state
from tests.unit.cluster import SmallCluster, cluster
from tests.unit.virtual_time import virtually

PAGE = (Path(__file__).parents[2] / "docs" / "actors.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


async def read_page(client: Cluster | None = None) -> dict[str, Any]:
    """Run the snippets from top to bottom; without a client, those that await one are left out. What they define."""
    names: dict[str, Any] = {"asyncio": asyncio, "cluster": client, "__name__": "page"}
    for snippet in SNIPPETS:
        code = compile(snippet, "docs/actors.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        waits = bool(code.co_flags & inspect.CO_COROUTINE)
        if snippet.startswith("exercise(") or (waits and client is None):
            continue
        result = eval(code, names)
        if waits:
            await result
    return names


async def with_classes(small: SmallCluster, *classes: type[Actor]) -> None:
    await small.add("a", classes=classes)
    await small.assign("a")
    await small.served_by("a")


def client_of(small: SmallCluster) -> Cluster:
    async def open_link() -> Link:
        return small.nats.link("client")

    return Cluster(open_link, cluster="default")


@virtually
async def test_the_calls_of_the_page_do_what_it_says() -> None:
    """Its own assertions hold, on a node that has its class."""
    room = (await read_page())["Room"]
    async with cluster() as small:
        await with_classes(small, room)
        async with client_of(small) as client:
            await read_page(client)

            with pytest.raises(Rejected):
                await client.actor("room", "7").play(player="ann", points=-1)


def test_the_classes_of_the_page_pass_their_exercise() -> None:
    """The call that the page shows, and the same for its other classes."""
    names = asyncio.run(read_page())
    snippet = next(snippet for snippet in SNIPPETS if snippet.startswith("exercise("))
    exec(snippet, names)

    calls = [("play", {"player": "ann", "points": n}) for n in (1, 4, 2)]
    names["exercise"](names["LargeRoom"], calls, seeds=range(4))
    names["exercise"](names["NewRoom"], calls, seeds=range(8), before=names["Room"])


@virtually
async def test_older_state_and_an_older_log_become_the_same_newer_state() -> None:
    """`upgrade` gets a dict, and the newer events replay the older log."""
    names = await read_page()
    async with cluster(snapshot_every=4) as small:
        await with_classes(small, names["Room"])
        for n, player in enumerate(("ann", "bob", "ann", "bob", "ann", "ann")):
            await small.router.send_message(ActorId("room", "snapshot"), "play", {"player": player, "points": n})
        for n in (2, 3):
            await small.router.send_message(ActorId("room", "events"), "play", {"player": "ann", "points": n})
        assert "snapshot" in small.kinds("snapshot")
        assert "snapshot" not in small.kinds("events")

        await small.restart("a", classes=(names["NewRoom"],))
        await small.served_by("a")
        for key, best in (("snapshot", 11), ("events", 5)):
            await small.router.send_message(ActorId("room", key), "play", {"player": "cem", "points": 0})
            live = small.nodes["a"].node.host.units["shard.0"].actors[ActorId("room", key)]
            assert vars(live.instance)["best"] == best


def test_upgrade_gets_bytes_where_there_is_a_capture() -> None:
    """And without one on the newer class, older state is not portable."""

    class Older(Actor):
        actor_type = "thing"

        def capture(self) -> bytes:
            return b"old"

        def restore(self, data: bytes) -> None:
            self.data = data

    class Newer(Older):
        schema_version = 2

        def upgrade(self, state: bytes, from_version: int) -> bytes:
            return state + str(from_version).encode()

    class Unready(Older):
        schema_version = 2

    assert vars(restore_state(Newer, capture_state(Older()), 1))["data"] == b"old1"
    with pytest.raises(StateNotPortable, match="define upgrade"):
        restore_state(Unready, b"old", 1)
    with pytest.raises(StateNotPortable, match="newer than this node's code"):
        restore_state(Older, b"old", 2)


def test_what_the_page_says_of_state() -> None:
    """A new attribute keeps its default, keys come back sorted, private attributes do not come back."""

    class Kept(Actor):
        actor_type = "kept"

        def __init__(self) -> None:
            self.by_name: dict[str, int] = {}
            self.added_later = 7
            self._cache = 1

    kept = restore_state(Kept, b'{"by_name": {}}', 1)
    vars(kept)["by_name"].update(b=1, a=2)
    vars(kept)["_cache"] = 2
    again = vars(restore_state(Kept, capture_state(kept), 1))

    assert list(again["by_name"]) == ["a", "b"]
    assert (again["added_later"], again["_cache"]) == (7, 1)


@virtually
async def test_what_the_page_says_of_limits() -> None:
    """A large command is refused; a large state takes commands and does not move."""
    names = await read_page()
    room = ActorId("room", "7")
    async with cluster(max_state_bytes=200, snapshot_every=4) as small:
        await with_classes(small, names["Room"])
        await small.add("b", classes=(names["Room"],))
        with pytest.raises(PayloadTooLarge, match="FERRY_MAX_COMMAND_BYTES"):
            await small.router.send_message(room, "play", {"player": "a" * 512 * 1024, "points": 1})
        for n in range(8):
            await small.router.send_message(room, "play", {"player": f"{n}" * 40, "points": n})
        assert "snapshot" not in small.kinds("7")[-4:]

        with pytest.raises(PayloadTooLarge, match="FERRY_MAX_STATE_BYTES"):
            await small.move("m", "b")

    default = Settings()
    said = (default.max_command_bytes, default.max_state_bytes, default.snapshot_every, default.dedup_window)
    assert said == (512 * 1024, 256 * 2**20, 32, 128)
    assert default.passivate_after_s == 600


@virtually
async def test_an_error_in_a_command_is_handler_failed_and_nothing_is_applied() -> None:
    """So is what is not an error of the page's own."""
    names = await read_page()
    async with cluster() as small:
        await with_classes(small, names["Room"])
        with pytest.raises(HandlerFailed):
            await small.router.send_message(ActorId("room", "7"), "play", {"player": "ann", "points": "three"})
        assert await small.router.send_message(ActorId("room", "7"), "leader") is None


def test_the_page_is_short_and_names_no_client_for_actors() -> None:
    """What it says there is not, is not: an actor is handed nothing to call others or to be woken with."""
    assert len(PAGE.splitlines()) <= 120
    offered = {name for name in dir(Actor) if not name.startswith("_")}
    described = {"actor_id", "actor_type", "emit", "schema_version", "state_schema", "upgrade"}
    assert offered - described == {"apply", "handlers"}  # for hosts
