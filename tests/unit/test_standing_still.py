"""Chains that stand still one after the other, as far as waiting a moment can bring that about."""

from __future__ import annotations

import asyncio

from tests.unit.virtual_time import clock, virtually
from workflows.standing_still import LINE, PATIENCE_S, StandingStill


@virtually
async def test_the_next_begins_when_all_moves_of_the_one_before_have_ended() -> None:
    """A convoy stands still until its last move has committed."""
    still = StandingStill(clock)
    await still.begin(["a1", "a2"])
    following = asyncio.ensure_future(still.begin(["b"]))

    still.end("a1")
    await asyncio.sleep(0.001)
    assert not following.done()
    still.end("a2")
    still.end("a2")
    await asyncio.sleep(0.001)

    assert following.done()
    assert still.would_wait(["c"])
    assert not still.would_wait(["b"])


@virtually
async def test_nobody_waits_long_for_one_that_takes_its_time() -> None:
    """A worker's thread is kept meanwhile, and a move may stand still for seconds: it copies a large state."""
    still = StandingStill(clock)
    await still.begin(["slow"])
    began_s = clock()

    await still.begin(["next"])

    assert clock() - began_s <= PATIENCE_S + 0.001


@virtually
async def test_nothing_is_copied_ahead_while_others_stand_still() -> None:
    """They share cores: a convoy stood still a third longer beside others that were copied."""
    still = StandingStill(clock)
    happened = []

    async def copy(move: str) -> None:
        async with still.copying_ahead([move]):
            happened.append(f"{move} copies")
            await asyncio.sleep(0.03)

    await still.begin(["a"])
    copying = [asyncio.ensure_future(copy(move)) for move in "bc"]
    await asyncio.sleep(0.02)
    assert happened == []

    still.end("a")
    await asyncio.sleep(0.001)
    assert happened == ["b copies", "c copies"]
    assert still.would_wait(["d"])

    await asyncio.gather(*copying)
    assert not still.would_wait(["d"])


@virtually
async def test_whoever_has_copied_goes_before_those_that_want_to() -> None:
    """A chain that waited for all that come to be copied would never stand still."""
    still = StandingStill(clock)
    happened = []

    async def chain(move: str, copying_s: float) -> None:
        async with still.copying_ahead([move]):
            happened.append(f"{move} copies")
            await asyncio.sleep(copying_s)
        await still.begin([move])
        happened.append(f"{move} stands still")
        await asyncio.sleep(0.02)
        still.end(move)

    first = [asyncio.ensure_future(chain("a", 0.01)), asyncio.ensure_future(chain("b", 0.03))]
    await asyncio.sleep(0.02)  # a waits for b's copying
    await asyncio.gather(*first, chain("c", 0.01))

    assert happened == [
        "a copies", "b copies", "a stands still", "b stands still", "c copies", "c stands still",
    ]  # fmt: skip


@virtually
async def test_a_large_state_that_is_copied_keeps_nobody_for_long() -> None:
    """It takes seconds. Once it has been waited for, others go on beside it."""
    still = StandingStill(clock)

    async def copy() -> None:
        async with still.copying_ahead(["large"]):
            await asyncio.sleep(5)

    copying = asyncio.ensure_future(copy())
    await asyncio.sleep(0)
    began_s = clock()
    await still.begin(["next"])
    assert clock() - began_s <= PATIENCE_S + 0.001
    still.end("next")

    assert not still.would_wait(["the one after"])
    await copying


@virtually
async def test_they_wait_in_the_order_of_their_calls_and_only_few_of_them() -> None:
    """All threads of a worker waiting would leave none to those that stand still."""
    still = StandingStill(clock)
    await still.begin(["first"])
    began = []

    async def begin(name: str) -> None:
        await still.begin([name])
        began.append(name)

    line = [asyncio.ensure_future(begin(f"in line {number}")) for number in range(LINE)]
    await asyncio.sleep(0)
    assert not still.would_wait(["too many"])
    await begin("too many")
    assert began == ["too many"]

    await asyncio.gather(*line)
    assert began == ["too many", *(f"in line {number}" for number in range(LINE))]


@virtually
async def test_whoever_gives_up_waiting_leaves_its_place() -> None:
    """A task that is cut short at its time limit must not be waited for by all that come later."""
    still = StandingStill(clock)
    await still.begin(["first"])
    waiting = asyncio.ensure_future(still.begin(["second"]))
    await asyncio.sleep(0)

    waiting.cancel()
    await asyncio.wait([waiting])
    still.end("first")

    assert not still.would_wait(["third"])


@virtually
async def test_others_that_pass_by_make_nobody_wait_for_longer() -> None:
    """With more chains than may wait one always stands still; whoever waits does not wait for all of them."""
    still = StandingStill(clock)
    waited_s = []

    async def chain(number: int) -> None:
        began_s = clock()
        await still.begin([f"c{number}"])
        waited_s.append(clock() - began_s)
        await asyncio.sleep(0.03)
        still.end(f"c{number}")

    async with asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(chain(number))
            await asyncio.sleep(0.01)

    assert len(waited_s) == 100
    assert max(waited_s) <= PATIENCE_S + 0.001


@virtually
async def test_a_task_that_comes_twice_does_not_wait_for_itself() -> None:
    """Celery delivers some twice."""
    still = StandingStill(clock)
    await still.begin(["a"])
    began_s = clock()

    await still.begin(["a"])

    assert clock() == began_s
