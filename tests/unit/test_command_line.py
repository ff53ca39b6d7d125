"""`ferry` without a cluster: parsing, exit codes, one-line errors, and what status makes of what it was told."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import structlog
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.directory import MapEntry
from routing.errors import InDoubt, InvalidInput, Rejected, Timeout, Unavailable
from routing.logs import configure_logging
from routing.membership import Member, NodeState
from routing.shard_map import Ownership
from routing.subjects import actor_key
from workflows import demo, presentation
from workflows.cli import cli
from workflows.command_line import Failure, FerryGroup, parse_arguments, read_settings
from workflows.doctor import Finding, Verdict, _replicas
from workflows.local.probe import free_port
from workflows.lookup import steps
from workflows.progress import StillRunning
from workflows.records import STEPS, MigrationPlan, MigrationStatus, Move, advance, to_document
from workflows.status import HeldLock, Status, problems, to_json
from workflows.words import counted_units

_PROJECT = Path(__file__).parents[2]
READING = {"status", "doctor", "where", "send", "migrations", "migration", "plan", "demo"}


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without servers, and logging left as the test run has it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr("workflows.command_line.configure_logging", lambda level: None)
    monkeypatch.setenv("FERRY_NATS_URL", f"nats://127.0.0.1:{free_port()}")
    monkeypatch.setenv("FERRY_REDIS_URL", f"redis://127.0.0.1:{free_port()}/0")


def ferry(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="ferry")


# -- usage and errors --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-command"], "No such command"),
        (["status", "--no-such-option"], "No such option"),
        (["where"], "Missing argument"),
        (["where", "N14228"], "write TYPE/KEY"),
        (["send", "aircraft/N1", "fly", "distance"], "write KEY=VALUE"),
        (["send", "aircraft/N1", "fly", "a=1", "a=2"], "given twice"),
        (["send", "aircraft/N1", "fly", "--timeout", "0"], "--timeout"),
        (["migrate", "shard/1"], "--to"),
        (["migrate", "shard/one", "--to", "a"], "write shard/N"),
        (["migrate", "shard/-1", "--to", "a"], "write shard/N"),
        (["migrations", "--status", "lost"], "'--status'"),
        (["migrations", "--limit", "0"], "--limit"),
        (["node", "--actors", "examples.flights"], "--id"),
        (["node", "--id", "a"], "--actors"),
        (["node", "--id", "a b", "--actors", "examples.flights"], "node id 'a b'"),
        (["node", "--id", "a", "--actors", "no.such.module"], "no.such.module"),
        (["node", "--id", "a", "--actors", "examples.flights", "--weight", "0"], "--weight"),
        (["up", "--nodes", "0"], "--nodes"),
        (["demo", "--flights", "no-such-file.csv.gz"], "no-such-file"),
        (["demo", "--rate", "nan"], "--rate"),
        (["demo", "--rate", "inf"], "--rate"),
        (["demo", "--rate", "-1"], "--rate"),
        (["demo", "--rate", "1e999"], "--rate"),
    ],
)
@pytest.mark.usefixtures("nowhere")
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    """Whoever mistypes learns what is wrong in one line, before anything is connected to."""
    result = ferry(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ferry: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_demo_at_a_rate_that_is_none_starts_nothing(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a pause between flights, or with one without end, nothing would be shown."""
    monkeypatch.setattr(demo, "LocalCluster", None)

    with pytest.raises(InvalidInput, match="rate"):
        demo.run(None, rate, as_json=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["where", "aircraft/N1"], ["send", "aircraft/N1", "totals"], ["plan"], ["rebalance"], ["drain", "a"],
        ["migrate", "shard/1", "--to", "a"], ["cancel", "p1"], ["suspend"], ["resume"], ["migrations"],
        ["migration", "m1.0"],
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nowhere")
def test_a_server_that_is_away_is_one_line_and_exit_code_1(arguments: list[str]) -> None:
    """The line says which setting to look at, and stdout stays empty for whoever parses it."""
    result = ferry(*arguments)

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "FERRY_NATS_URL" in result.stderr or "FERRY_REDIS_URL" in result.stderr


def test_every_mistake_in_the_settings_is_named(nowhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are wrong usage: exit code 2."""
    monkeypatch.setenv("FERRY_SHARDS", "0")
    monkeypatch.setenv("FERRY_REPLICAS", "2")

    result = ferry("status")

    assert result.exit_code == 2
    assert "FERRY_SHARDS=0" in result.stderr
    assert "FERRY_REPLICAS=2" in result.stderr


@pytest.mark.parametrize("arguments", [["migrations"], ["status"], ["doctor"]])
@pytest.mark.usefixtures("nowhere")
def test_a_redis_url_that_names_another_server_is_a_redis_that_does_not_serve(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NATS, for instance, which greets whoever connects: what it says is no answer of Redis."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("FERRY_REDIS_URL", f"redis://127.0.0.1:{port}/0")
        threading.Thread(target=_greet_as_nats, args=(server,), daemon=True).start()

        result = ferry(*arguments)

    assert result.exit_code == 1
    assert "Protocol error" in result.output
    assert "FERRY_REDIS_URL" in " ".join(result.output.split())
    assert "internal error" not in result.output


def _greet_as_nats(server: socket.socket) -> None:
    greeted = []  # so that none is closed
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            client.sendall(b'INFO {"server_id":"N"}\r\n')
            greeted.append(client)


@pytest.mark.parametrize("module", ["def (", "raise RuntimeError('no licence\\nfound')", "1 / 0"])
@pytest.mark.usefixtures("nowhere")
def test_an_actor_module_that_cannot_be_loaded_is_one_line(tmp_path: Path, module: str) -> None:
    """Whatever it raises, it is the module's fault and no internal error."""
    name = f"broken_{abs(hash(module))}"
    (tmp_path / f"{name}.py").write_text(module)

    result = ferry("node", "--id", "a", "--actors", name)

    assert result.exit_code == 2
    assert result.stderr.startswith(f"ferry: --actors {name}: ")
    assert "while it was imported: " in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(("variable", "value"), [("FERRY_SHARDS", "0"), ("FERRY_LOG", "loud")])
@pytest.mark.parametrize("command", [["-m", "celery", "-A", "workflows", "worker"], ["-c", "import workflows.app"]])
def test_a_mistake_in_the_settings_ends_celerys_command_with_one_line(
    command: list[str], variable: str, value: str, tmp_path: Path
) -> None:
    """Exit code 2, which is not started again. A program that imports the app gets the error itself."""
    ended = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, timeout=60, capture_output=True, text=True, check=False,
        env={**os.environ, variable: value, "PYTHONPATH": str(_PROJECT)},
    )  # fmt: skip

    line = ended.stderr.splitlines()[-1]
    if "celery" in command:
        assert (ended.returncode, ended.stderr) == (2, f"{line}\n")
        assert line.startswith(f"ferry: {variable}={value}: ")
    else:
        assert line.startswith(f"routing.errors.InvalidInput: {variable}={value}: ")


@pytest.mark.usefixtures("nowhere")
def test_status_is_a_document_even_when_nothing_answers() -> None:
    """Monitoring that parses it finds every field, and the reason in words."""
    result = ferry("status", "--json")

    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {"cluster", "leader", "suspended", "shards_total", "nodes", "moves_running", "plan"} <= document.keys()
    assert document["nodes"] == []
    assert [("NATS" in problem, "Redis" in problem) for problem in document["problems"]] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.usefixtures("nowhere")
def test_doctor_fails_when_a_server_is_away_and_says_how_to_mend_it() -> None:
    """Exit code 1, a verdict and a mend for each."""
    result = ferry("doctor", "--json")

    findings = {finding["check"]: finding for finding in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert findings["nats"]["verdict"] == findings["redis"]["verdict"] == "fail"
    assert "FERRY_NATS_URL" in findings["nats"]["mend"]
    assert "FERRY_REDIS_URL" in findings["redis"]["mend"]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), 2), (Rejected("x"), 1), (Unavailable("x"), 1), (Timeout("x"), 1), (InDoubt("x"), 3),
        (StillRunning("x"), 3), (KeyError("x"), 1),
    ],
)  # fmt: skip
def test_each_kind_of_error_has_its_exit_code(error: Exception, code: int) -> None:
    """0 done, 1 failed, 2 wrong usage, 3 timed out while waiting."""
    assert Failure.of(error).code == code


def test_a_refusal_is_the_actors_word_not_an_error_of_the_tool() -> None:
    """`Rejected: ...` in the place of `ferry: ...`; the exit code stays 1."""

    @click.group(cls=FerryGroup)
    def cli_of_one() -> None: ...

    @cli_of_one.command()
    def refuse() -> None:
        raise Rejected("distance must be positive")

    result = CliRunner().invoke(cli_of_one, ["refuse"])

    assert (result.exit_code, result.stderr) == (1, "Rejected: distance must be positive\n")


def test_a_traceback_is_shown_with_debug_only() -> None:
    """A bug of ours is one line, too, and names the option that shows more."""

    @click.group(cls=FerryGroup)
    @click.option("--debug", is_flag=True)
    def broken(debug: bool) -> None: ...

    @broken.command()
    def crash() -> None:
        raise KeyError("spam")

    quiet, loud = (CliRunner().invoke(broken, options) for options in (["crash"], ["--debug", "crash"]))

    assert (quiet.exit_code, loud.exit_code) == (1, 1)
    assert quiet.stderr == "ferry: internal error: KeyError: 'spam' (ferry --debug ... shows where)\n"
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize("name", list(cli.commands))
def test_every_command_explains_itself_in_one_sentence(name: str) -> None:
    """And every reading command offers JSON."""
    command = cli.commands[name]

    assert command.help is not None
    assert command.help.endswith(".")
    assert "\n" not in command.help
    assert name not in READING or any("--json" in parameter.opts for parameter in command.params)


def test_without_arguments_it_shows_its_help() -> None:
    """In the order of the commands' definition, processes first."""
    result = ferry()

    assert result.exit_code == 0
    assert result.output.index("  up ") < result.output.index("  status ") < result.output.index("  drain ")


# -- arguments of a command --------------------------------------------------------------------------------------------
@given(
    st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.none() | st.booleans() | st.integers(0, 2**53))
)
def test_values_that_are_json_arrive_as_json(arguments: dict[str, Any]) -> None:
    """`distance=1400` is a number, `dest=null` is None."""
    assert parse_arguments(tuple(f"{name}={json.dumps(value)}" for name, value in arguments.items())) == arguments


def test_values_that_are_not_json_arrive_as_text() -> None:
    """Nobody has to quote twice in a shell; what has quotes is JSON, and a value may contain =."""
    given_ = (
        "dest=ORD",
        'quoted="7"',
        "empty=",
        "formula=a=b",
        "film=Infinity War",
        "code=007",
        "list=[NaN",
        "nan=nan",
    )

    assert parse_arguments(given_) == {
        "dest": "ORD", "quoted": "7", "empty": "", "formula": "a=b", "film": "Infinity War", "code": "007",
        "list": "[NaN", "nan": "nan",
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", "[1, -1e999]", '{"a": NaN}', str(2**64), str(-(2**63) - 1), "9" * 5_000],
)
def test_a_number_that_no_message_carries_is_refused(value: str) -> None:
    """It would arrive as text, or as another number."""
    with pytest.raises(InvalidInput, match=r"argument 'item' has .* no finite number of up to 64 bits") as refusal:
        parse_arguments((f"item={value}",))

    assert len(str(refusal.value)) < 250
    assert parse_arguments((f'item="{value.replace(chr(34), "")}"',))["item"] == value.replace('"', "")


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 1.5, -1e308, [1.0, {"a": 0}]])
def test_a_number_at_the_edge_arrives_as_it_is(value: Any) -> None:
    """The largest and the smallest there are, and an int stays one."""
    arrived = parse_arguments((f"item={json.dumps(value)}",))["item"]

    assert (arrived, type(arrived)) == (value, type(value))


# -- what status says --------------------------------------------------------------------------------------------------
def member(node: str, state: NodeState = NodeState.UP) -> Member:
    return Member(
        id=node, incarnation=f"{node}-1", state=state, weight=1.0, role="", types=("aircraft",), host="h", pid=1,
        version="0.1.0",
    )  # fmt: skip


def owned_by(owner: str) -> MapEntry:
    return MapEntry(Ownership(owner=owner, incarnation=f"{owner}-1", epoch=3), 7)


HEALTHY = Status(
    cluster="default", workers=["w@h"], leader="c1", suspended=False, shards_total=3, moves_running=0,
    entries={"shard.0": owned_by("a"), "shard.1": owned_by("b"), "shard.2": owned_by("b")},
    members={"a": member("a"), "b": member("b")},
    answers={"a": {"actors": 5, "serving": True}, "b": {"actors": 7, "serving": True}},
)  # fmt: skip
UPGRADING = {node: replace(member(node), schemas={"aircraft": version}) for node, version in {"a": 1, "b": 2}.items()}
LOCK = HeldLock(unit="shard.1", move="m1", owner="b", destination="a", idle_s=2.0)

PINNED = actor_key(ActorId("aircraft", "N14228"))
REFUSAL = "pause: a handler of aircraft/N14228 still runs after 4 s"
PLAN = MigrationPlan(id="p1", reason="node c joined", created_at=1.0, started_at=1.0, total=4, completed=3, failed=1)


def test_a_healthy_cluster_has_no_problems() -> None:
    """Neither has one in which a move runs as it should."""
    assert problems(HEALTHY) == []
    assert problems(replace(HEALTHY, locks=[LOCK])) == []


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (replace(HEALTHY, leader=None), "no coordinator leads"),
        (replace(HEALTHY, workers=[]), "no worker answers"),
        (replace(HEALTHY, redis_error="Redis is away", workers=None), "Redis is away"),
        (replace(HEALTHY, shards_total=5), "2 shards (shard/3, shard/4) have no owner yet"),
        (replace(HEALTHY, shards_total=4, unreadable=["shard.3"]), "shard/3 has no value in the map that can be read"),
        (replace(HEALTHY, unreadable=["shard.1"]), "shard/1 has no value in the map that can be read"),
        (replace(HEALTHY, members={"a": member("a")}), "node b is gone and 2 shards (shard/1, shard/2) have not"),
        (
            replace(HEALTHY, members=UPGRADING),
            "code of older schema versions than others (theirs in brackets): aircraft 1 (2)",
        ),
        (
            replace(HEALTHY, entries=HEALTHY.entries | {PINNED: owned_by("c"), "shard.2": owned_by("c")}),
            "node c is gone and 1 shard and 1 actor (shard/2, aircraft/N14228) have not",
        ),
        (replace(HEALTHY, answers={"a": None}), "node a holds a lease but does not answer"),
        (replace(HEALTHY, answers={"a": {"serving": False}}), "node a could not renew its lease"),
        (replace(HEALTHY, answers={"a": {"counters": {"quarantined": 2}}}), "quarantined"),
        (replace(HEALTHY, answers={"a": {"paused": ["shard.0"]}}), "at node a shard/0 has been paused without a lock"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=None)]), "shard/1 is locked by move m1 (b to a), of which there"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=12.0)]), "stands still for 12 s"),
        (replace(HEALTHY, locks=[replace(LOCK, idle_s=12.0, error=REFUSAL)]), f"still for 12 s ({REFUSAL}): see"),
        (replace(HEALTHY, locks=[replace(LOCK, error=REFUSAL)]), f"is tried again: {REFUSAL}"),
        (replace(HEALTHY, plan=PLAN, plan_error=REFUSAL), f"of the last plan did not complete (the latest: {REFUSAL})"),
    ],
)
def test_each_problem_is_said_in_one_sentence(broken: Status, said: str) -> None:
    """One cause, one sentence."""
    found = problems(broken)

    assert len(found) == 1
    assert said in found[0]


def test_a_cluster_in_which_every_node_drains_says_so() -> None:
    """Nobody could take the shards of the first, nor of the last."""
    draining = {node: member(node, NodeState.DRAINING) for node in "ab"}

    assert "no node is up that takes shards" in problems(replace(HEALTHY, members=draining))[0]


def test_a_unit_paused_at_a_node_that_has_just_given_it_away_is_no_problem() -> None:
    """The node answered before the commit, the map was read after it."""
    assert problems(replace(HEALTHY, answers={"a": {"paused": ["shard.1"]}})) == []


def test_status_counts_shards_from_the_map_and_actors_from_the_nodes() -> None:
    """A silent node still owns what the map says; nobody knows its actors."""
    document = to_json(replace(HEALTHY, answers={"a": {"actors": 5}, "b": None}))

    assert [(node["id"], node["shards"], node["actors"]) for node in document["nodes"]] == [("a", 1, 5), ("b", 2, None)]


def test_status_has_the_fields_of_the_latest_plan() -> None:
    """Those that the interface promises."""
    document = to_json(replace(HEALTHY, plan=PLAN))["plan"]

    assert {"id", "reason", "total", "completed", "failed", "started_at", "finished_at"} <= document.keys()


def test_one_copy_is_a_warning_and_a_lagging_copy_a_failure() -> None:
    """Doctor reads JetStream's own account of each stream."""
    one = {"config": {"num_replicas": 1}}
    peers = [{"name": "n2", "current": True}, {"name": "n3", "current": True}]
    three = {"config": {"num_replicas": 3}, "cluster": {"replicas": peers}}
    lagging = {"config": {"num_replicas": 3}, "cluster": {"replicas": [{"name": "n2", "current": False}]}}

    verdicts = [_replicas(infos).verdict for infos in ({"s": one}, {"s": three}, {"s": three, "t": lagging})]

    assert verdicts == [Verdict.WARN, Verdict.OK, Verdict.FAIL]
    assert _replicas({"s": {"error": {"err_code": 10059}}}).verdict is Verdict.FAIL


def test_a_finding_is_plain_json() -> None:
    finding = Finding(check="nats", verdict=Verdict.OK, found="here")

    assert json.loads(json.dumps(finding.to_json())) == {"check": "nats", "verdict": "ok", "found": "here", "mend": ""}


def test_units_are_counted_by_what_they_are() -> None:
    """As a node has them that drains: an actor apart is no shard."""
    assert counted_units(["shard.1", "shard.2", PINNED]) == "2 shards and 1 actor"
    assert counted_units([PINNED]) == "1 actor"
    assert counted_units([]) == "0 shards"


# -- records and values as people read them ----------------------------------------------------------------------------
def test_a_completed_move_has_the_time_of_every_step() -> None:
    """Milliseconds count from the step before."""
    move = Move(
        id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0, started_at=10.5
    )
    for number, status in enumerate(list(MigrationStatus)[1:7]):
        move = advance(move, status, now=11.0 + number)

    found = steps(to_document(move))

    assert [step["step"] for step in found] == ["plan", "launch", *STEPS]
    assert [step["ms"] for step in found] == [None, 500.0, 500.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0]


def test_a_move_that_was_rolled_back_ends_with_that() -> None:
    """The step it never reached is not listed."""
    move = Move(id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0)
    move = advance(advance(move, MigrationStatus.PAUSED, now=11.0), MigrationStatus.ROLLED_BACK, now=12.0)

    found = [(step["step"], step["status"]) for step in steps(to_document(move))]

    assert found == [("plan", "planned"), ("pause", "paused"), ("end", "rolled_back")]


def test_a_table_without_a_terminal_is_aligned_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers to the right, None as a dash, no blanks at the ends of lines."""
    presentation.print_table(["node", "shards"], [["a", 100], ["bcdef", None]])

    assert capsys.readouterr().out == "NODE   SHARDS\na         100\nbcdef       -\n"


def a_row(**given: Any) -> dict[str, Any]:
    """As `ferry migrations --json` has it, as far as people are shown it."""
    return {
        "id": "m843080b0b442.0", "move_id": "m843080b0b442", "actor_id": "aircraft/N14228", "shard": 17, "source": "a",
        "destination": "b", "status": "rolled_back", "state_bytes": 2_000, "blackout_ms": 41.53, "error": None,
        "created_at": 10.0, "paused_at": 11.0, "finished_at": None, **given,
    }  # fmt: skip


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize(("columns", "left_out"), [(120, set()), (80, {"SHARD", "SIZE"})])
def test_on_a_narrow_terminal_a_row_does_without_shard_and_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int, left_out: set[str]
) -> None:
    """Id, actor, status and time stay in one piece, each row on one line."""
    on_a_terminal(monkeypatch, columns)
    now = time.time()

    presentation.print_migrations([a_row(finished_at=now)])

    lines = capsys.readouterr().out.splitlines()
    headings = " ".join(lines[:-1]).split()
    assert (
        set(headings) == {"ID", "ACTOR", "SHARD", "FROM", "TO", "STATUS", "SIZE", "BLACKOUT", "(ms)", "AT"} - left_out
    )
    at = presentation.clock_time(now)
    assert lines[-1].split() == ["m843080b0b442.0", "aircraft/N14228", *(["17"] if not left_out else []), "a", "b",
                                 "rolled_back", *(["2.0", "KiB"] if not left_out else []), "41.5", at]  # fmt: skip
    assert all(len(line) <= columns for line in lines)


def test_what_is_too_wide_for_any_terminal_is_not_cut_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An id that somebody copies has to be whole."""
    on_a_terminal(monkeypatch, 40)
    actor = "aircraft/" + "N" * 60

    presentation.print_migrations([a_row(actor_id=actor)])

    assert actor in capsys.readouterr().out.splitlines()[-1].split()


def test_errors_stand_below_the_table_once_for_each_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sentence in a narrow column would be a word a line."""
    on_a_terminal(monkeypatch, 80)
    sentence = "send: node b did not take the state of 40 actors within 30 s, so the move was rolled back"

    presentation.print_migrations([a_row(error=sentence), a_row(id="m843080b0b442.1", error=sentence)])

    out = capsys.readouterr().out
    assert out.count(sentence) == 1
    assert out.endswith(f"errors:\n  - m843080b0b442: {sentence}\n")


def test_migrations_are_shown_by_the_time_that_stands_in_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    """The latest change first, be it the end or a step; a plan's moves are created together, so that tells nothing."""
    ended = [a_row(id="first", finished_at=12.0), a_row(id="last", finished_at=14.0)]

    presentation.print_migrations([*ended, a_row(id="running", paused_at=13.0)])

    table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in table] == ["last", "running", "first"]
    assert [row[-1] for row in table] == sorted((row[-1] for row in table), reverse=True)


def test_attempts_are_shown_when_a_step_was_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    """Six for six steps reads like five retries."""
    move = Move(id="m1", plan_id="p1", unit="shard.1", shard=1, source="a", destination="b", created_at=10.0)
    for number, status in enumerate(list(MigrationStatus)[1:7]):
        move = advance(move, status, now=11.0 + number)

    shown = []
    for attempts in (6, 7):
        document = to_document(replace(move, attempts=attempts))
        presentation.print_record(document | {"steps": steps(document)})
        shown.append("attempts" in capsys.readouterr().out)

    assert shown == [False, True]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 * 2**20, "300 MiB")])
def test_sizes_are_rounded(count: int, text: str) -> None:
    assert presentation.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0345, "34 ms"), (3.21, "3.2 s"), (200.0, "3 min 20 s")])
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert presentation.duration(seconds) == text


# -- logs --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def own_logging() -> Iterator[None]:
    """Logging as it was before the test, whatever the test configures."""
    root, kept = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("ferry.admission", "ferry.directory", "ferry.host"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.configure(**kept)


@pytest.mark.usefixtures("own_logging")
def test_logs_of_ours_and_of_libraries_look_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One JSON object per line, with logger and level; nothing below the level."""
    monkeypatch.setenv("FERRY_LOG", "json")
    monkeypatch.setenv("FERRY_LOG_LEVEL", "info")
    configure_logging("error", path=str(tmp_path / "log"))

    structlog.get_logger("ferry.test").info("node up", node="a")
    structlog.get_logger("ferry.test").debug("unseen")
    logging.getLogger("celery.test").warning("hello %s", "worker")
    for name in ("ferry.directory", "ferry.host", "ferry.admission"):
        structlog.get_logger(name).info("one of hundreds")

    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["logger"], line["level"], line["event"]) for line in lines] == [
        ("ferry.test", "info", "node up"),
        ("celery.test", "warning", "hello worker"),
    ]
    assert lines[0]["node"] == "a"


@pytest.mark.usefixtures("own_logging")
def test_what_is_logged_and_how_may_stand_in_the_env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As all that Ferry reads; the environment wins."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("FERRY_LOG=json\nFERRY_LOG_LEVEL=debug\n")
    monkeypatch.setenv("FERRY_LOG_LEVEL", "error")

    configure_logging(path=str(tmp_path / "log"))
    logging.getLogger("ferry.test").warning("unseen")
    logging.getLogger("ferry.test").error("seen")

    (line,) = (tmp_path / "log").read_text().splitlines()
    assert json.loads(line)["event"] == "seen"


# What an application that imports the client finds in its modules, told to say something.
CLIENT = """
import importlib, logging, sys, structlog
for name in sys.argv[1].split():
    log = importlib.import_module(f"routing.{name}").log
    log.info("unseen")
    log.warning("50% lost", module=name, node="a b")
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
log.info("asked for", name="n")
structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
log.debug("as configured", n=1)
"""


def test_a_client_logs_where_its_application_does_and_never_to_stdout_by_itself() -> None:
    """Warnings on stderr, what the standard library is told to show, and structlog as soon as it is configured."""
    modules = [
        "birth",
        "directory",
        "failpoints",
        "lease",
        "membership",
        "nats_connection",
        "nats_link",
        "nats_watch",
        "nats_wire",
        "router",
    ]

    ended = subprocess.run(
        [sys.executable, "-c", CLIENT, " ".join(modules)], timeout=60, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(_PROJECT)},
    )  # fmt: skip

    warnings = [f"50% lost module={name} node='a b'" for name in modules]
    assert ended.stderr.splitlines() == [*warnings, "INFO asked for name=n"]
    assert ended.stdout.splitlines() == ["n=1 event='as configured'"]


@pytest.mark.parametrize("variable", ["FERRY_LOG", "FERRY_LOG_LEVEL"])
@pytest.mark.usefixtures("own_logging")
def test_an_unknown_log_setting_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, with what there is."""
    monkeypatch.setenv(variable, "loud")

    with pytest.raises(InvalidInput, match=f"{variable}=loud: use "):
        configure_logging()


@pytest.mark.usefixtures("own_logging", "nowhere")
def test_mistakes_in_settings_and_in_logging_are_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody corrects one to be told of the next; what is wrong with both is said once."""
    monkeypatch.setenv("FERRY_SHARDS", "0")
    monkeypatch.setenv("FERRY_LOG", "loud")
    with pytest.raises(InvalidInput, match=r"FERRY_SHARDS=0: .*; FERRY_LOG=loud: "):
        read_settings()

    Path(".env").mkdir()
    with pytest.raises(InvalidInput) as refusal:
        read_settings()
    assert str(refusal.value).count("cannot be read from .env") == 1
