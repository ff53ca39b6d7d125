"""The Migrations page in a real Flower, started as its users start it: `celery -A workflows flower`."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import flower as stock_flower
import psutil
import pytest
from celery import Celery
from celery.events import EventDispatcher
from redis import Redis

from routing.address import ActorId, shard_of
from tests.integration.waiting import until
from workflows.app import app as ferry_app
from workflows.local.binaries import redis_server_binary
from workflows.local.probe import free_port, redis_process_id
from workflows.records import (
    STATUS_AFTER,
    STEPS,
    ActorMigration,
    ActorRow,
    MigrationPlan,
    MigrationStatus,
    Move,
    advance,
)
from workflows.store import RecordStore

HOSTILE = "<script>alert('await_ack')</script> & \"more\""
ATTEMPTS = 3  # a port that was free may be taken before Flower binds it


@dataclass(frozen=True)
class Answer:
    status: int
    text: str

    @property
    def document(self) -> Any:
        return json.loads(self.text)


class Flower:
    """A Flower process of the test's own, started outside the project's folder."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def get(self, path: str, *, login: str | None = None) -> Answer:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if login is not None:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return Answer(response.status, response.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            return Answer(error.code, error.read().decode())

    def shows(self, path: str, condition: Callable[[Any], bool]) -> bool:
        """Whether the document at `path` comes to meet the condition."""
        return until(lambda: condition(self.get(path).document))

    def answers(self, path: str = "/healthcheck") -> bool:
        try:
            return self.get(path).status == 200
        except OSError:
            return False

    def came_up(self, prefix: str) -> bool:
        """Whether it answers in time, and has not ended."""
        answered = until(lambda: self.process.poll() is not None or self.answers(f"{prefix}/healthcheck"), 30.0)
        return answered and self.process.poll() is None


StartFlower = Callable[..., Flower]


@pytest.fixture
def start_flower(redis_url: str, tmp_path: Path) -> Iterator[StartFlower]:
    """Starts `celery -A workflows flower` with more arguments, and more environment; ends it with the test."""
    started: list[Flower] = []

    def start(*arguments: str, env: dict[str, str] | None = None, prefix: str = "") -> Flower:
        for _ in range(ATTEMPTS):
            port = free_port()
            log = tmp_path / f"flower-{port}.log"
            command = [sys.executable, "-m", "celery", "-A", "workflows", "flower", f"--port={port}", *arguments]
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    cwd=tmp_path,
                    stdout=output,
                    stderr=output,
                    env={**_clean_environment(), "FERRY_REDIS_URL": redis_url, **(env or {})},
                )
            started.append(Flower(process, port, log))
            if started[-1].came_up(prefix):
                return started[-1]
        pytest.fail(f"Flower did not come up:\n{started[-1].log.read_text()}")

    yield start
    for one in started:
        one.process.kill()
        one.process.wait(10)


def _clean_environment() -> dict[str, str]:
    """Ours without settings that a developer's shell may hold."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("FERRY_", "FLOWER_"))}


# -- records to show ---------------------------------------------------------------------------------------------------


def seeded(redis_url: str) -> dict[str, Move]:
    """One plan whose moves ended, or stand, in different ways; by name."""
    return asyncio.run(_seeded(redis_url))


async def _seeded(redis_url: str) -> dict[str, Move]:
    store = RecordStore.connect(redis_url, "default")
    names = ("completed", "rolled_back", "sent", "planned")
    moves = {
        name: Move(
            id=f"m-{name}", plan_id="p-one", unit=f"shard.{shard}", shard=shard, source=f"source-{shard}",
            destination="node-d", created_at=1_001.0 if name == "planned" else 1_000.0,
            task_ids={step: f"task-{name}-{step}" for step in STEPS},
        )
        for shard, name in enumerate(names)
    }  # fmt: skip
    rows = {
        move.id: [ActorRow(index=index, actor_id=f"cart/{name}-{index}") for index in range(2)]
        for name, move in moves.items()
    }
    plan = MigrationPlan(id="p-one", reason="node-d joined <now>", created_at=1_000.0)
    stored = await store.create_plan(plan, list(moves.values()), rows)
    moves = dict(zip(names, stored, strict=True))

    async def driven(name: str, steps: int, **last: Any) -> Move:
        move = await store.save(replace(moves[name], started_at=1_000.5))
        for number, status in enumerate(list(STATUS_AFTER.values())[:steps], start=1):
            captured = [replace(row, version=7, state_bytes=1_500, digest="d1ge57") for row in rows[move.id]]
            more = {"actors_total": len(captured)} | (last if number == steps else {})
            move = await store.save(
                advance(move, status, now=1_000.5 + 0.012 * number, **more),
                actors=captured if status is MigrationStatus.CAPTURED else (),
            )
        return move

    moves["completed"] = await driven(
        "completed", 6, actors_total=2, state_bytes=3_000, blackout_ms=41.5, messages_buffered=3
    )
    moves["sent"] = await driven("sent", 4, actors_total=2, state_bytes=3_000)
    acked = await driven("rolled_back", 3)
    moves["rolled_back"] = await store.save(advance(acked, MigrationStatus.ROLLED_BACK, now=1_009.0, error=HOSTILE))
    await store.close()
    return moves


# -- what it shows -----------------------------------------------------------------------------------------------------


def test_the_page_shows_every_move_and_the_latest_plan(redis_url: str, start_flower: StartFlower) -> None:
    """As HTML for people, and the same values as JSON; every Flower page leads to it."""
    moves = seeded(redis_url)
    flower = start_flower()

    page = flower.get("/migrations")
    data = flower.get("/migrations/data")

    assert page.status == 200
    assert all(f'href="/migration/{move.id}"><code>{move.id}</code>' in page.text for move in moves.values())
    assert "p-one" in page.text
    assert "node-d joined &lt;now&gt;" in page.text
    assert "1 of 4 moves completed" in page.text
    assert "42 ms" in page.text  # the blackout
    assert 'href="/migrations"' in flower.get("/workers").text
    assert (data.document["plan"]["total"], data.document["plan"]["failed"]) == (4, 1)
    assert data.document["blackout_ms"] == {"p50": 41.5, "p99": 41.5}
    assert [move["id"] for move in data.document["moves"]] == ["m-planned", "m-sent", "m-rolled_back", "m-completed"]


def test_the_steps_say_how_long_each_took_and_where_a_move_stopped(redis_url: str, start_flower: StartFlower) -> None:
    """In their order, timed from the step before; the first from the launch."""
    seeded(redis_url)
    flower = start_flower()

    steps = {move["id"]: move["steps"] for move in flower.get("/migrations/data").document["moves"]}

    assert all([step["name"] for step in taken] == list(STEPS) for taken in steps.values())
    assert [step["duration_ms"] for step in steps["m-completed"]] == pytest.approx([12] * 6, abs=0.01)
    assert [step["progress"] for step in steps["m-rolled_back"]] == ["done"] * 3 + ["stopped", "waiting", "waiting"]
    assert [step["progress"] for step in steps["m-sent"]] == ["done"] * 4 + ["running", "waiting"]
    assert [step["progress"] for step in steps["m-planned"]] == ["waiting"] * 6


def test_a_hostile_error_text_is_shown_and_does_nothing(redis_url: str, start_flower: StartFlower) -> None:
    """On both pages and in what they poll, which the script puts into the page as it is."""
    seeded(redis_url)
    flower = start_flower()

    shown = [
        flower.get("/migrations").text,
        flower.get("/migrations/data").document["html"],
        flower.get("/migration/m-rolled_back").text,
        flower.get("/migration/m-rolled_back/data").document["html"],
    ]

    for html in shown:
        assert "&lt;script&gt;alert(&#x27;await_ack&#x27;)&lt;/script&gt; &amp; &quot;more&quot;" in html
        assert "<script>alert" not in html


def test_one_move_has_a_page_with_its_actors(redis_url: str, start_flower: StartFlower) -> None:
    """The migrations as everywhere else; a move nobody knows is a 404, not an error."""
    seeded(redis_url)
    flower = start_flower()

    page = flower.get("/migration/m-completed")
    data = flower.get("/migration/m-completed/data").document

    assert all(text in page.text for text in ("cart/completed-0", "cart/completed-1", "d1ge57", "1.5 KiB", "p-one"))
    assert data["move"]["status"] == "completed"
    assert [set(row) for row in data["migrations"]] == [{field.name for field in fields(ActorMigration)}] * 2
    assert flower.get("/migration/nobody").status == 404
    assert flower.get("/migration/nobody/data").status == 404


def test_filters_select_moves_and_say_what_they_cannot(redis_url: str, start_flower: StartFlower) -> None:
    """By status, plan and actor, alone and together; a mistake is one sentence."""
    seeded(redis_url)
    flower = start_flower()

    def shown(query: str) -> list[str]:
        return [move["id"] for move in flower.get(f"/migrations/data?{query}").document["moves"]]

    assert shown("status=completed") == ["m-completed"]
    assert shown("status=in_flight") == ["m-sent"]
    assert shown("plan=p-one&limit=1") == ["m-sent"]  # what is under way is never cut off by newer moves
    assert shown("plan=p-two") == []
    nothing = flower.get("/migrations?plan=p-two")
    assert "No move matches" in nothing.text
    assert "node-d joined" not in nothing.text  # the card is the asked plan's, not the latest one's
    assert flower.get("/migrations/data?plan=p-one").document["plan"]["id"] == "p-one"
    wrong = flower.get("/migrations/data?status=lost")
    assert wrong.status == 400
    assert "status 'lost' is unknown" in wrong.document["error"]
    assert flower.get("/migrations?limit=0").status == 400


def test_an_actors_moves_are_found_by_its_name(redis_url: str, start_flower: StartFlower) -> None:
    """Across plans, through its shard."""

    async def stored() -> None:
        store = RecordStore.connect(redis_url, "default")
        for number in range(2):
            move = Move(
                id=f"m-{number}", plan_id=f"p-{number}", unit="shard.1", source="a", destination="b",
                shard=shard_of(ActorId.parse("cart/7"), 256), created_at=100.0 + number,
            )  # fmt: skip
            await store.save(move, actors=[ActorRow(index=0, actor_id="cart/7")])
        await store.close()

    asyncio.run(stored())
    flower = start_flower()

    found = flower.get("/migrations/data?actor=cart/7").document["moves"]

    assert [move["id"] for move in found] == ["m-1", "m-0"]


def test_steps_show_what_flower_saw_of_their_tasks(redis_url: str, start_flower: StartFlower) -> None:
    """The time leads to Flower's own page of the task, its state stands beside it when it is not SUCCESS; nothing of
    either where Flower saw nothing.
    """
    moves = seeded(redis_url)
    flower = start_flower()
    task_ids = moves["completed"].task_ids

    def states(document: Any) -> list[str | None]:
        return next(
            [s["task_state"] for s in move["steps"]] for move in document["moves"] if move["id"] == "m-completed"
        )

    assert states(flower.get("/migrations/data").document) == [None] * 6

    with Celery(broker=redis_url, set_as_current=False) as app, app.connection() as connection:
        app.conf.event_exchange = ferry_app.conf.event_exchange
        events = EventDispatcher(connection, hostname="worker@test", app=app)

        def succeeded(document: Any) -> bool:
            # Again each time, because Flower may not listen to events yet.
            events.send(
                "task-received", uuid=task_ids["pause"], name="workflows.migration.pause", args="()", kwargs="{}"
            )
            events.send("task-succeeded", uuid=task_ids["pause"], runtime=0.01, result="None")
            events.send("task-started", uuid=task_ids["capture"])
            return states(document)[:2] == ["SUCCESS", "STARTED"]

        assert flower.shows("/migrations/data", succeeded)

    page = flower.get("/migrations").text
    assert re.search(r'<a href="/task/task-completed-pause"[^>]*>\s*12 ms\s*</a>', page)
    assert re.search(r'<a href="/task/task-completed-capture".*?<span class="badge [^"]*">STARTED</span>', page, re.S)
    assert ">SUCCESS<" not in page
    assert "/task/task-completed-delete" not in page
    assert flower.get("/task/task-completed-pause").status == 200


# -- who may see it ----------------------------------------------------------------------------------------------------


def test_pages_and_data_ask_for_flowers_login(redis_url: str, start_flower: StartFlower) -> None:
    """401 without it, as everywhere in Flower."""
    seeded(redis_url)
    flower = start_flower("--basic-auth=ada:lovelace")
    paths = ("/migrations", "/migrations/data", "/migration/m-sent", "/migration/m-sent/data", "/api/migrations")

    assert [flower.get(path).status for path in paths] == [401] * 5
    assert [flower.get(path, login="ada:wrong").status for path in paths] == [401] * 5
    assert [flower.get(path, login="ada:lovelace").status for path in paths] == [200] * 5


def test_programs_get_the_records_under_the_rules_of_flowers_api(redis_url: str, start_flower: StartFlower) -> None:
    """Refused by default; where Flower's API is open, the same list as `ferry migrations --json`."""
    seeded(redis_url)
    closed = start_flower()
    opened = start_flower(env={"FLOWER_UNAUTHENTICATED_API": "true"})

    migrations = opened.get("/api/migrations?status=completed").document

    assert closed.get("/api/migrations").status == 401
    assert [row["actor_id"] for row in migrations] == ["cart/completed-0", "cart/completed-1"]
    assert set(migrations[0]) == {field.name for field in fields(ActorMigration)}
    wrong = opened.get("/api/migrations?limit=many")
    assert (wrong.status, wrong.text) == (400, "limit 'many' is malformed: use 1 to 500")


def test_flower_listens_on_loopback_unless_told_otherwise(start_flower: StartFlower) -> None:
    """Without a login, whoever reaches Flower can shut workers down."""
    flower = start_flower()

    listening = {
        connection.laddr.ip
        for connection in psutil.Process(flower.process.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }

    assert listening == {"127.0.0.1"}


def test_the_page_works_under_a_url_prefix(start_flower: StartFlower) -> None:
    """Behind a proxy: links, assets and polling stay under the prefix, and nothing comes from elsewhere."""
    flower = start_flower("--url-prefix=ops", prefix="/ops")

    page = flower.get("/ops/migrations").text

    source = re.search(r'data-source="([^"]*)"', page)
    assert source is not None
    loaded = re.findall(r'(?:src|<link[^>]*href)="([^"]*)"', page)
    assert {f"/ops/migrations/assets/migrations.{kind}" for kind in ("css", "js")} <= set(loaded)
    for path in [source[1], *loaded]:
        assert path.startswith("/ops/")
        assert flower.get(path).status == 200
    assert "Nothing has moved yet" in page


# -- when things break -------------------------------------------------------------------------------------------------


def test_without_redis_the_page_says_so_and_comes_back_by_itself(
    redis_url: str, start_flower: StartFlower, tmp_path: Path
) -> None:
    """503 with words, in the page and in its data; Flower goes on."""
    seeded(redis_url)
    flower = start_flower()
    assert flower.get("/migrations").status == 200
    port = int(redis_url.rpartition(":")[2].partition("/")[0])

    with Redis.from_url(redis_url) as admin:
        admin.shutdown(nosave=True)
    page, data, one = (flower.get(path) for path in ("/migrations", "/migrations/data", "/migration/m-sent"))

    assert (page.status, data.status, one.status) == (503, 503, 503)
    assert f"Redis at 127.0.0.1:{port} does not serve" in data.document["error"]
    assert all(f"Redis at 127.0.0.1:{port} does not serve" in html for html in (page.text, one.text))
    assert flower.answers()

    command = [
        str(redis_server_binary()),
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as again:
        try:
            assert until(lambda: redis_process_id(port) == again.pid)
            assert flower.get("/migrations/data").status == 200
        finally:
            again.kill()


def test_a_flower_with_another_navigation_bar_is_refused_in_one_line(tmp_path: Path) -> None:
    """A page that is silently missing would be looked for in vain."""
    for page in (Path(stock_flower.__file__).parent / "templates").glob("*.html"):
        (tmp_path / page.name).write_text(page.read_text().replace("reverse_url('broker')", "reverse_url('queues')"))

    ended = _run(
        "import flower.urls, sys\n"
        "from celery.bin.celery import main\n"
        f"flower.urls.settings['template_path'] = {str(tmp_path)!r}\n"
        "sys.argv = ['celery', '-A', 'workflows', 'flower', '--port=0']\n"
        "main()\n",
        tmp_path,
    )

    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ferry: Flower 2.2")
    assert "navbar.html" in line


def test_only_flower_loads_the_page(tmp_path: Path) -> None:
    """Importing the app loads nothing of Flower. Celery's commands load Flower all by themselves, but not the page."""
    alone = _run(
        "import sys, workflows.app\n"
        "print(sorted(name for name in sys.modules if name.split('.')[0] in ('flower', 'tornado')))\n",
        tmp_path,
    )
    command = _run(
        "import atexit, sys\n"
        "atexit.register(lambda: print('page' if 'workflows.flower_page.page' in sys.modules else 'no page'))\n"
        "from celery.bin.celery import main\n"
        "sys.argv = ['celery', '-A', 'workflows', 'report']\n"
        "main()\n",
        tmp_path,
    )

    assert alone.stdout == "[]\n"
    assert command.stdout.endswith("no page\n")


def test_flowers_own_options_win_over_our_defaults(tmp_path: Path) -> None:
    """Command line and configuration file are read after the page is put in, which may happen twice."""
    (tmp_path / "flowerconfig.py").write_text(
        "from routing.settings import Settings\n"
        "from workflows.flower_page.install import install\n"
        "install(Settings())\n"
        "max_tasks = 77\n"
    )

    ended = _run(
        "from flower.command import apply_options, options\n"
        "from flower.urls import handlers\n"
        "from routing.settings import Settings\n"
        "from workflows.flower_page.install import install\n"
        "install(Settings())\n"
        "print(options.address, options.max_tasks, len(handlers))\n"
        "apply_options('celery', ['--address=0.0.0.0'])\n"
        "print(options.address, options.max_tasks, len(handlers))\n",
        tmp_path,
    )

    first, second = (line.split() for line in ended.stdout.splitlines())
    assert first[:2] == ["127.0.0.1", "5000"]
    assert second == ["0.0.0.0", "77", first[2]]


def _run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=_clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
