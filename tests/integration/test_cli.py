"""`ferry` against a cluster of real processes, each command run as a user runs it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from routing.address import ActorId, shard_of
from routing.errors import Unavailable
from tests.integration.waiting import until
from workflows.foreground import connect_patiently
from workflows.local import EmbeddedServers, LocalCluster
from workflows.local.probe import free_port

SHARDS = 16
RECORD_FIELDS = {
    "id", "plan_id", "move_id", "actor_id", "shard", "source", "destination", "status", "step", "version",
    "state_bytes", "digest", "attempts", "error", "messages_buffered", "blackout_ms", "created_at", "paused_at",
    "captured_at", "serialized_at", "sent_at", "acked_at", "finished_at", "task_ids",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    out: str
    error: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cluster:
    """Two nodes, a coordinator and a worker; `ferry` runs a command against them."""

    def __init__(self, processes: LocalCluster) -> None:
        self.processes = processes

    def ferry(self, *arguments: str) -> Ended:
        ended = subprocess.run(
            [sys.executable, "-m", "workflows.cli", *arguments], env=self.processes.environment(), timeout=60,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def status(self) -> Any:
        self.processes.check_alive()
        return self.ferry("status", "--json").json

    def shards(self) -> dict[str, int]:
        return {node["id"]: node["shards"] for node in self.status()["nodes"]}

    def settles(self, *nodes: str) -> bool:
        """Whether in time these are the nodes, each has shards, and nothing moves or is wrong."""

        def settled() -> bool:
            status = self.status()
            found = {node["id"]: node["shards"] for node in status["nodes"]}
            return set(found) == set(nodes) and all(found.values()) and not status["problems"] and at_rest(status)

        return until(settled, within_s=30)


def place(cluster: Cluster, actor: str) -> Any:
    return cluster.ferry("where", actor, "--json").json


def same_shard(prefix: str, shards: int) -> tuple[str, str]:
    """Two aircraft of one shard."""
    first = ActorId("aircraft", f"{prefix}0")
    names = (ActorId("aircraft", f"{prefix}{n}") for n in range(1, 1_000))
    return str(first), str(next(one for one in names if shard_of(one, shards) == shard_of(first, shards)))


def at_rest(status: Any) -> bool:
    return status["moves_running"] == 0 and (status["plan"] is None or status["plan"]["finished_at"] is not None)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with LocalCluster(EmbeddedServers(folder), env={"FERRY_SHARDS": str(SHARDS)}) as processes:
        for node in "ab":
            processes.add_node(node)
        processes.add_coordinator()
        processes.add_worker()
        running = Cluster(processes)
        assert running.settles("a", "b"), running.status()
        yield running


def other(node: str) -> str:
    return "b" if node == "a" else "a"


def test_a_command_reaches_its_actor_and_is_applied_once(cluster: Cluster) -> None:
    """The reply is JSON on stdout; the same message id again gets the same reply."""
    command = ("send", "aircraft/N1", "fly", "distance=1400", "dest=ORD", "--message-id", "UA1545")

    first, again, totals = (cluster.ferry(*words) for words in (command, command, ("send", "aircraft/N1", "totals")))

    assert (first.code, first.json) == (again.code, again.json) == (0, 1)
    assert totals.json == {"flights": 1, "miles": 1400, "delay_minutes": 0, "last_airport": "ORD"}


def test_a_rejection_is_its_reason_and_exit_code_1(cluster: Cluster) -> None:
    """The actor said no; an unknown command is wrong usage instead."""
    rejected = cluster.ferry("send", "aircraft/N1", "fly", "distance=-1")
    unknown = cluster.ferry("send", "aircraft/N1", "dive")

    assert (rejected.code, rejected.out, rejected.error) == (1, "", "Rejected: distance must be positive\n")
    assert unknown.code == 2
    assert "it has fly, totals" in unknown.error


def test_status_shows_nodes_leader_and_shards(cluster: Cluster) -> None:
    """The fields that the interface promises; every shard is counted once."""
    status = cluster.status()

    assert {"cluster", "leader", "suspended", "shards_total", "nodes", "moves_running", "plan"} <= status.keys()
    assert {"id", "incarnation", "state", "weight", "shards", "actors"} <= status["nodes"][0].keys()
    assert status["cluster"] == "default"
    assert status["suspended"] is False
    assert status["problems"] == []
    assert [(node["id"], node["state"]) for node in status["nodes"]] == [("a", "up"), ("b", "up")]
    assert sum(node["shards"] for node in status["nodes"]) == status["shards_total"] == SHARDS


def test_a_shard_moved_by_hand_is_where_it_was_sent_and_on_record(cluster: Cluster) -> None:
    """`migrate --wait` returns after the commit; `where`, `migrations` and `migration` tell the same story."""
    # Given an actor that lives on some node.
    assert cluster.ferry("send", "aircraft/N2", "fly", "distance=7").code == 0
    before = cluster.ferry("where", "aircraft/N2", "--json").json
    source, shard = before["node"], before["shard"]
    assert shard == shard_of(ActorId("aircraft", "N2"), SHARDS)

    # When its shard is sent to the other one.
    moved = cluster.ferry("migrate", f"shard/{shard}", "--to", other(source), "--wait", "--json")

    # Then the actor is there, with its state, and its record has every step.
    assert moved.code == 0, moved.error
    assert moved.json["plan"]["completed"] == 1
    after = cluster.ferry("where", "aircraft/N2", "--json").json
    assert (after["node"], after["epoch"]) == (other(source), before["epoch"] + 1)
    assert cluster.ferry("send", "aircraft/N2", "totals").json["miles"] == 7
    [record] = cluster.ferry("migrations", "--actor", "aircraft/N2", "--status", "completed", "--json").json
    assert record.keys() == RECORD_FIELDS
    assert (record["source"], record["destination"], record["shard"]) == (source, other(source), shard)
    detail = cluster.ferry("migration", record["id"], "--json").json
    assert [step["step"] for step in detail["steps"]] == [
        "plan", "pause", "capture", "serialize", "send", "await_ack", "delete"
    ]  # fmt: skip
    assert cluster.ferry("migration", record["move_id"], "--json").json["migrations"] == [record]
    shown = cluster.ferry("migration", record["id"]).out
    assert "blackout ms" in shown
    assert "await_ack" in shown


def test_an_actor_moved_by_hand_stays_there_until_it_is_unpinned(cluster: Cluster) -> None:
    """It alone: its shard stays, and may go elsewhere meanwhile; every one of its own moves is on record."""
    # Given two actors of one shard.
    pinned, mate = same_shard("P", SHARDS)
    for actor in (pinned, mate):
        assert cluster.ferry("send", actor, "fly", "distance=7").code == 0
    source = place(cluster, pinned)["node"]

    # When one is moved, and then their shard, there and back.
    moved = cluster.ferry("migrate", pinned, "--to", other(source), "--wait", "--json")
    assert moved.code == 0, moved.error
    assert moved.json["plan"]["completed"] == 1
    assert cluster.ferry("send", pinned, "fly", "distance=5").json == 2
    apart = [(place(cluster, actor)["node"], place(cluster, actor)["pinned"]) for actor in (pinned, mate)]
    shard = f"shard/{place(cluster, mate)['shard']}"
    for node in (other(source), source):
        assert cluster.ferry("migrate", shard, "--to", node, "--wait").code == 0
    status = cluster.status()

    # Then it stays where it was sent; the rest went with the shard.
    assert apart == [(other(source), True), (source, False)]
    assert status["actors_apart"] == [{"actor": pinned, "node": other(source), "pinned": True}]
    assert sum(node["shards"] for node in status["nodes"]) == SHARDS
    assert f"{pinned} is at {other(source)}" in cluster.ferry("where", pinned).out
    assert pinned in cluster.ferry("status").out
    [record] = cluster.ferry("migrations", "--actor", pinned, "--json").json[-1:]
    assert (record["source"], record["destination"], record["status"]) == (source, other(source), "completed")
    assert cluster.ferry("migrate", pinned, "--to", other(source)).code == 1

    # When it is unpinned it goes home, with all it had, and with its shard from then on.
    gone = cluster.ferry("unpin", pinned, "--wait")
    assert gone.code == 0, gone.error
    assert until(lambda: cluster.status()["actors_apart"] == [])
    assert (place(cluster, pinned)["node"], place(cluster, pinned)["pinned"]) == (source, False)
    assert cluster.ferry("send", pinned, "totals").json["miles"] == 12
    assert cluster.ferry("migrate", shard, "--to", other(source), "--wait").code == 0
    assert place(cluster, pinned)["node"] == other(source)
    assert cluster.ferry("send", pinned, "totals").json["miles"] == 12
    assert cluster.ferry("migrate", shard, "--to", source, "--wait").code == 0


def test_what_cannot_be_moved_is_refused_with_the_reason(cluster: Cluster) -> None:
    """Each in one line: unknown node, unknown shard, already there, not pinned; unknown ids exit with 1."""
    here = cluster.ferry("where", "aircraft/N3", "--json").json
    shard = f"shard/{here['shard']}"

    refusals = {
        ("migrate", shard, "--to", "x"): (2, "nodes are a, b"),
        ("migrate", "shard/99", "--to", "a"): (2, "0 to 15"),
        ("migrate", shard, "--to", here["node"], "--wait"): (1, "nothing to move"),
        ("migrate", "aircraft/N3", "--to", here["node"]): (1, "nothing to move"),
        ("migrate", "aircraft", "--to", "a"): (2, "write TYPE/KEY"),
        ("migrate", "nope/N3", "--to", "a"): (2, "actor type 'nope' is unknown to node a: it has aircraft"),
        ("migrate", "nope/N3", "--to", "b"): (2, "actor type 'nope' is unknown to node b"),
        ("unpin", "aircraft/N3"): (1, "not pinned"),
        ("drain", "x"): (2, "nodes are a, b"),
        ("cancel", "p0"): (2, "'p0' is unknown"),
        ("migration", "m0.0"): (1, "no record 'm0.0'"),
        ("migration", "nonsense"): (1, "no record 'nonsense'"),
    }
    for arguments, (code, said) in refusals.items():
        ended = cluster.ferry(*arguments)
        assert (ended.code, ended.error.count("\n")) == (code, 1), ended
        assert said in ended.error
    assert not place(cluster, "nope/N3")["pinned"]


def test_a_node_is_drained_and_then_stops_cleanly(cluster: Cluster) -> None:
    """Suspended, the drain waits and says why (exit code 3); resumed, it ends; SIGTERM then exits 0."""
    cluster.processes.add_node("c", options=["--weight", "2"])
    assert cluster.settles("a", "b", "c"), cluster.status()
    share = cluster.shards()["c"]

    # When nothing may move, the wait ends with its reason, and the node keeps what it has.
    assert cluster.ferry("suspend").code == 0
    asked = cluster.ferry("drain", "c")
    assert "nothing moves until `ferry resume`" in asked.out
    waited = cluster.ferry("drain", "c", "--wait", "--timeout", "2.5")
    assert waited.code == 3, waited
    assert f"{share} of {share} shards" in waited.error
    assert "rebalancing is suspended" in waited.error
    planned = cluster.ferry("plan", "--json").json
    assert (planned["moves"], planned["reasons"]) == (share, {"node c drains": share})

    # When it may, it ends, without having been asked again.
    assert cluster.ferry("resume").code == 0
    drained = cluster.ferry("drain", "c", "--wait", "--timeout", "30")
    assert drained.code == 0, drained
    assert cluster.shards()["c"] == 0
    assert cluster.ferry("rebalance", "--wait").out == "nothing to move: the map is balanced\n"

    assert cluster.processes.remove("node-c") == 0
    assert cluster.settles("a", "b"), cluster.status()


def test_a_move_that_fails_exits_with_1_and_says_why(cluster: Cluster) -> None:
    """The destination refuses; the shard stays, and the record says so."""
    assert cluster.ferry("suspend").code == 0
    cluster.processes.add_node("d", env={"FERRY_FAILPOINTS": "stage_ahead=error,verify=error"})
    assert until(lambda: "d" in cluster.shards())
    cluster.ferry("send", "aircraft/N4", "fly", "distance=1")
    home = cluster.ferry("where", "aircraft/N4", "--json").json

    failed = cluster.ferry("migrate", f"shard/{home['shard']}", "--to", "d", "--wait")

    assert failed.code == 1, failed
    assert "rolled back" in failed.error
    assert "failpoint verify" in failed.error
    assert cluster.ferry("where", "aircraft/N4", "--json").json["node"] == home["node"]
    [record] = cluster.ferry("migrations", "--actor", "aircraft/N4", "--json").json
    assert record["status"] == "rolled_back"
    assert cluster.processes.remove("node-d") == 0
    assert cluster.ferry("resume").code == 0
    assert cluster.settles("a", "b"), cluster.status()


def test_doctor_finds_a_running_cluster_in_order(cluster: Cluster) -> None:
    """Warnings are allowed, failures are not; versions and durability are named."""
    examined = cluster.ferry("doctor", "--json")

    findings = {finding["check"]: finding for finding in examined.json}
    assert examined.code == 0, examined.out
    assert {"python", "ferry", "celery", "nats-py", "nats", "redis", "replicas", "coordinator", "workers"} <= set(
        findings
    )
    assert findings["sync_interval"]["found"] == "always (embedded server)"
    assert findings["replicas"]["found"].startswith("R1")


def test_without_redis_actors_are_served_and_status_still_tells(cluster: Cluster) -> None:
    """Redis holds reports: its loss is named, costs nothing else, and ends neither coordinator nor worker."""
    cluster.processes.servers.redis.kill9()  # type: ignore[union-attr]
    try:
        status = cluster.ferry("status", "--json")
        told = cluster.ferry("send", "aircraft/N5", "fly", "distance=1")
        records = cluster.ferry("migrations")
    finally:
        cluster.processes.servers.start_redis()

    assert status.code == 0
    assert [node["id"] for node in status.json["nodes"]] == ["a", "b"]
    assert ["Redis" in problem for problem in status.json["problems"]] == [True]
    assert told.code == 0
    assert (records.code, records.error.count("\n")) == (1, 1)
    assert cluster.settles("a", "b"), cluster.status()


def test_a_terminal_gets_a_table_and_json_stays_alone_on_stdout(cluster: Cluster) -> None:
    """Text has a heading and a row per node."""
    text = cluster.ferry("status").out

    assert text.startswith("cluster default, led by ")
    assert "NODE  STATE" in text
    assert text.endswith("no problems\n")


# -- processes in the foreground ---------------------------------------------------------------------------------------
async def test_a_server_that_never_comes_is_given_up_on() -> None:
    """With the clear error of the last try."""
    with pytest.raises(Unavailable, match="no NATS server answers"):
        await connect_patiently(
            f"nats://127.0.0.1:{free_port()}", name="test", stopping=asyncio.Event(), patience_s=0.0
        )


async def test_a_stop_ends_the_waiting_for_a_server() -> None:
    """Whoever stops a node that waits for NATS need not wait as well."""
    stopping = asyncio.Event()
    waiting = asyncio.create_task(
        connect_patiently(f"nats://127.0.0.1:{free_port()}", name="test", stopping=stopping, patience_s=60.0)
    )

    stopping.set()

    assert await asyncio.wait_for(waiting, timeout=20) is None


STUBBORN = """
import asyncio
from routing.logs import configure_logging
from workflows.foreground import run_until_stopped
configure_logging()  # to stderr
async def serve(stopping):
    print("serving", flush=True)
    await stopping.wait()
    print("draining", flush=True)
    await asyncio.sleep(3600)
run_until_stopped(serve)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains_and_the_second_one_kills(number: signal.Signals) -> None:
    """A drain that takes too long is cut short by asking again."""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", STUBBORN], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "serving\n"
            process.send_signal(number)
            assert process.stdout.readline() == "draining\n"
            process.send_signal(number)
            assert process.wait(timeout=20) == -number
        finally:
            process.kill()


def test_a_node_waits_for_a_server_that_comes_late(tmp_path: Path) -> None:
    """After a reboot everything starts at once: the node warns once, then comes up."""
    servers = EmbeddedServers(tmp_path, nats_port=free_port(), redis_port=free_port())
    late = LocalCluster(servers, env={"FERRY_SHARDS": "4"})
    try:
        node = late.add_node("a")
        assert until(lambda: "waiting for NATS" in node.log_tail())

        late.start()

        assert until(lambda: "node up" in node.log_tail()), node.log_tail()
        assert node.log_tail().count("waiting for NATS") == 1
        node.ask_to_stop()
        assert node.wait(20.0) == 0
    finally:
        late.stop()
