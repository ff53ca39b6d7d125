"""`ferry` without a cluster: parsing, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from routing.errors import InDoubt, InvalidInput, Rejected, Timeout, Unavailable
from workflows import demo
from workflows.cli import cli
from workflows.command_line import Failure, FerryGroup, parse_arguments, read_settings
from workflows.local.probe import free_port
from workflows.progress import StillRunning

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


@pytest.mark.usefixtures("nowhere")
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
