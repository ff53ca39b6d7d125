"""Commands that are decided where they arrive, without a task: they end as those do that have one."""

from __future__ import annotations

import asyncio
from unittest import mock

import pytest

from routing.envelope import Answer
from routing.errors import PayloadTooLarge, Unavailable
from runtime.mailbox import Mailboxes
from runtime.testing import Fault, MemoryLink
from tests.unit.cluster import SmallCluster, answered, cluster
from tests.unit.virtual_time import until, virtually


async def posted(small: SmallCluster, entries: list[int]) -> list[asyncio.Future[Answer]]:
    """Writes that come one right behind the other; what will be answered to each."""
    return [await small.post("a", small.command("k", "write", f"m-{entry}", entry=entry)) for entry in entries]


@virtually
async def test_a_command_that_answers_with_an_awaitable_is_decided_again_from_the_log() -> None:
    """What it had changed before that was seen is not in the log, and must not stay."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=1)

        assert await small.send("k", "write_later", entry=2) == [1, 2]
        assert await small.send("k", "write_later", entry=3) == [1, 2, 3]

        assert await small.send("k", "read") == [1, 2, 3]
        assert small.kinds("k").count("command") == 3


@virtually
async def test_what_comes_behind_a_command_under_way_is_served_in_order() -> None:
    """One at a time, whether the first had a task or not."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        futures = await posted(small, [1, 2, 3, 4])

        assert [(await answered(future)).value for future in futures] == [2, 3, 4, 5]
        assert await small.send("k", "read") == [0, 1, 2, 3, 4]


@virtually
@pytest.mark.parametrize("fault", ["drop_reply", "drop_request", "late"])
async def test_an_append_without_an_answer_is_decided_again_before_what_waits_behind_it(fault: Fault) -> None:
    """By reading the log, never by appending the same again."""
    async with cluster("a", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb(fault, "append", "=k")

        futures = await posted(small, [1, 2, 3])

        assert [(await answered(future)).value for future in futures] == [2, 3, 4]
        assert small.disturbed()
        assert await small.send("k", "read") == [0, 1, 2, 3]


@virtually
async def test_a_link_that_takes_nothing_more_costs_only_time() -> None:
    """Nothing was sent: the command is decided again, and its event is in the state once."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        with mock.patch.object(MemoryLink, "append_then", side_effect=Unavailable("too much waits")) as refusing:
            assert await small.send("k", "write", entry=1) == 2

        assert refusing.called
        assert await small.send("k", "read") == [0, 1]


@virtually
async def test_a_reply_too_large_to_be_logged_is_a_logged_refusal() -> None:
    """Or a late duplicate would apply after the sender was told no."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        for _ in range(2):
            with pytest.raises(PayloadTooLarge):
                await small.send("k", "shout", "m-1", size_bytes=small.nats.max_payload)

        assert small.kinds("k").count("rejection") == 1
        assert await small.send("k", "read") == [0]


@virtually
async def test_a_pause_waits_for_an_append_under_way() -> None:
    """And the move carries what it has stored."""
    async with cluster("a", "b", append_timeout_s=1.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb("drop_reply", "append", "=k")
        (future,) = await posted(small, [1])
        await until(small.disturbed)

        await small.move("m", "b")
        await small.served_by("b")

        assert (await answered(future)).value == 2
        assert await small.send("k", "read") == [0, 1]


@virtually
async def test_a_node_that_stops_leaves_no_task_behind_for_an_append_under_way() -> None:
    """Closing its link is how it learns that the append is in doubt; by then nobody may begin anything."""
    async with cluster("a", append_timeout_s=2.0) as small:
        await small.send("k", "write", entry=0)
        small.disturb("drop_reply", "append", "=k")
        await posted(small, [1])
        await until(small.disturbed)
        node = small.nodes["a"].node

        with mock.patch("runtime.node.STOP_S", 0.1):
            await node.stop()

        assert not node._tasks


@virtually
async def test_a_mistake_after_an_append_ends_the_node() -> None:
    """It is no error of an actor's, and an actor that is never at rest again would be worse."""
    async with cluster("a") as small:
        await small.send("k", "write", entry=0)

        with mock.patch.object(Mailboxes, "_stored", side_effect=ZeroDivisionError):
            await posted(small, [1])
            with pytest.raises(ZeroDivisionError):
                await small.nodes["a"].task

        small.everyone.clear()
