"""Three NATS servers and three replicas: a member dies in the middle of a rebalance, and everything goes on.

    node d joins -> it stops itself when the first shard is announced to it -> the member that leads the map's stream
    is killed -> d goes on -> the rebalance completes -> the member comes back
    node d drains -> the same, with the leader of a log's stream, as d is about to send its first shard

Times are as shipped but for the leases; the load goes on through both.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import orjson

from routing.errors import Unavailable
from routing.subjects import kv_stream
from tests.checker.check import violations
from tests.checker.history import Evidence
from tests.nemesis.cases import Marker, Party
from tests.nemesis.fleet import SHARDS, Fleet
from tests.nemesis.load import Load, actors_of
from tests.nemesis.run import Nemesis, Tally
from tests.nemesis.view import LogWatch, View
from workflows.local import EmbeddedServers, LocalProcess, nats_server_binary
from workflows.local.probe import answers, free_port
from workflows.local.servers import MAX_CONSUMERS, MAX_PAYLOAD_BYTES

MEMBERS = ("n1", "n2", "n3")
START_S = 20.0
PORT_TRIES = 5
JOINED_S = 120.0  # a rebalance, a stream's election (up to 8 s), a node lease
OUT_S = 20.0  # a member stays away until the rebalance has ended, but at most this long

# A killed stream leader stops writes for up to 8 s, so a lease lasts 15 s. The other times are as shipped.
PATIENT = {
    "FERRY_SHARDS": str(SHARDS),
    "FERRY_REPLICAS": "3",
    "FERRY_NODE_LEASE_S": "15",
    "FERRY_LEADER_LEASE_S": "15",
    "FERRY_APPEND_TIMEOUT_S": "2",
    "FERRY_DEDUP_WINDOW": "4096",
    "FERRY_MOVES_AT_ONCE": "1",
}


class ThreeServers(EmbeddedServers):
    """Redis as embedded, NATS as a cluster of three members on free ports, which can be killed one by one."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.members: dict[str, LocalProcess] = {}
        self._ports: dict[str, int] = {}

    @property
    def nats_url(self) -> str:
        return ",".join(f"nats://127.0.0.1:{port}" for port in self._ports.values())

    def start_nats(self) -> None:
        """Start all three. Ports are looked for, not reserved: when one is taken meanwhile, all start on others."""
        for tries_left in reversed(range(PORT_TRIES)):
            try:
                self._start_all()
                return
            except Unavailable:
                self._kill_all()
                if tries_left == 0:
                    raise

    def start_member(self, name: str) -> None:
        """Start one that has ended, on its old port with its data. Raises Unavailable when it does not answer."""
        self.members[name].start()
        self._until_it_answers(name)

    def stop(self) -> None:
        self._kill_all()
        super().stop()

    def _start_all(self) -> None:
        self._ports = {name: free_port() for name in MEMBERS}
        routes = {name: free_port() for name in MEMBERS}
        for name in MEMBERS:
            config = self._config(name, routes)
            self.members[name] = LocalProcess(
                f"nats-{name}", [str(nats_server_binary()), "-c", str(config)],
                log_path=self.data_dir / "logs" / f"nats-{name}.log", pass_fds=[self._claims["nats"].descriptor],
            ).start()  # fmt: skip
        for name in MEMBERS:
            self._until_it_answers(name)
        self.nats = self.members[MEMBERS[0]]

    def _config(self, name: str, routes: dict[str, int]) -> Path:
        folder = self.data_dir / "nats" / name
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "server.conf"
        others = ", ".join(f"nats://127.0.0.1:{port}" for other, port in routes.items() if other != name)
        config.write_text(
            f"""
            server_name: {name}
            listen: "127.0.0.1:{self._ports[name]}"
            max_payload: {MAX_PAYLOAD_BYTES}
            jetstream {{
              store_dir: {json.dumps(str(folder))}
              sync_interval: always
              limits {{ default_max_consumers: {MAX_CONSUMERS} }}
            }}
            cluster {{ name: nemesis, listen: "127.0.0.1:{routes[name]}", routes: [{others}] }}
            """
        )
        return config

    def _until_it_answers(self, name: str) -> None:
        deadline_s = time.monotonic() + START_S
        while not answers(f"nats://127.0.0.1:{self._ports[name]}"):
            if not self.members[name].running or time.monotonic() > deadline_s:
                raise Unavailable(f"{name} does not answer:\n{self.members[name].log_tail()}")
            time.sleep(0.02)

    def _kill_all(self) -> None:
        for process in self.members.values():
            process.kill9()


async def run_three(folder: Path, tally: Tally, *, tell: Callable[[str], None]) -> None:
    """Both rounds under one load; the tally counts what the checker has found."""
    servers = ThreeServers(folder)
    with Fleet(servers, env=PATIENT) as fleet:
        async with View(fleet.settings) as view:
            nemesis = Nemesis(fleet, view, tally)
            await nemesis.ready()
            tell(f"three members at {servers.nats_url}; ready")
            await _Rounds(fleet, servers, view, nemesis, tell).run()


class _Rounds:
    """A join and a drain of node d, each losing a member in its middle."""

    def __init__(
        self, fleet: Fleet, servers: ThreeServers, view: View, nemesis: Nemesis, tell: Callable[[str], None]
    ) -> None:
        self._fleet, self._servers, self._view, self._nemesis, self._tell = fleet, servers, view, nemesis, tell

    async def run(self) -> None:
        began = time.time()
        actors = [actors_of(shard, shards=SHARDS, run="three", count=1)[0] for shard in range(SHARDS)]
        found: list[str] = []
        subjects = self._view.session.subjects
        async with LogWatch(self._view, actors) as log, Load(self._view.clients, actors, run="three") as load:
            await load.warm(within_s=START_S)
            try:
                self._fleet.add_node("d", armed=Marker(Party.DESTINATION, "stage").armed)
                await self._lose_a_member("node-d", kv_stream(subjects.map_bucket), self._d_has_its_share)
                self._fleet.arm("node-d", "send=stop*1")  # now it is the source
                self._fleet.process("node-d").ask_to_stop()
                await self._lose_a_member("node-d", subjects.log_of(0), self._d_is_gone)
                self._fleet.remove_node("d")
            except TimeoutError as error:
                found.append(f"the case itself: {error}")
            left = await self._nemesis.rest()
            try:
                await load.finish(within_s=JOINED_S)
            except TimeoutError:
                found.append("a sender waits for ever")
        applied, unreadable = await self._nemesis.read(actors)
        moves = await self._view.moves_since(began)
        evidence = Evidence(
            applied=applied, epochs=log.epochs(), records=self._nemesis.record_ends(moves),
            leftovers=[*left, *unreadable],
        )  # fmt: skip
        found += violations(load.operations, evidence)
        for what in found:
            self._tell(f"  - {what}")
        tally = self._nemesis.tally
        tally.cases += 2
        tally.faults["kill nats"] += 2
        tally.violations += len(found)
        tally.count(load.operations, moves)

    async def _lose_a_member(self, marked: str, stream: str, done: Callable[[], bool]) -> None:
        """Kill the leader of `stream` while `marked` stands still, let that go on, and wait until it is done."""
        fleet, began_s = self._fleet, time.monotonic()

        async def standing() -> bool:
            return fleet.stands_still(marked)

        await self._view.until(standing, f"{marked} to reach its marker", within_s=JOINED_S)
        member = await self._leader_of(stream)
        self._servers.members[member].kill9()
        fleet.arm(marked, "")
        fleet.process(marked).resume()
        killed_s = time.monotonic()

        async def ended() -> bool:
            return done()

        waiting = asyncio.create_task(self._view.until(ended, f"the rebalance without {member}", within_s=JOINED_S))
        await asyncio.wait([waiting], timeout=OUT_S)
        alone_s = time.monotonic() - killed_s
        complete = "completed" if waiting.done() else "had not completed"
        await asyncio.to_thread(self._servers.start_member, member)
        await waiting
        self._tell(
            f"{member}, leader of {stream}, killed {killed_s - began_s:.1f} s into it: the rebalance {complete} without"
            f" it after {alone_s:.1f} s, and ended after {time.monotonic() - killed_s:.1f} s"
        )

    async def _leader_of(self, stream: str) -> str:
        async def leader() -> str | None:
            answer = await self._view.session.link.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout_s=5.0)
            name = orjson.loads(answer).get("cluster", {}).get("leader")
            return name if name in MEMBERS else None

        return await self._view.until(leader, f"a leader of {stream}", within_s=START_S)

    def _d_has_its_share(self) -> bool:
        return len(self._view.shards_of("d")) >= SHARDS // 4 and not self._view.session.locked()

    def _d_is_gone(self) -> bool:
        return not self._fleet.process("node-d").running and not self._view.shards_of("d")
