"""Settings: read once from the environment, `.env` and the command line; every mistake reported at once."""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import pytest

from routing.errors import InvalidInput
from routing.settings import MAX_SHARDS, Settings, variables

LADDER = [
    "append_timeout_s",
    "drain_handlers_s",
    "step_timeout_s",
    "pause_lease_s",
    "lock_lease_s",
    "task_time_limit_s",
    "visibility_timeout_s",
]
NUMBERS = [field.name for field in dataclasses.fields(Settings) if str(field.type) in {"int", "float"}]
TIMES = [field.name for field in dataclasses.fields(Settings) if str(field.type) == "float"]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No FERRY_ variable of the machine, and an empty folder without `.env` or embedded servers."""
    for name in [name for name in os.environ if name.startswith("FERRY_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_valid_and_load_without_any_setting() -> None:
    """A fresh machine needs no configuration."""
    assert Settings.load() == Settings()


def test_settings_do_not_change_once_made() -> None:
    """One frozen object per process."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().shards = 1  # type: ignore[misc]


@pytest.mark.parametrize(("lower", "upper"), list(itertools.pairwise(LADDER)))
def test_the_times_keep_the_order_the_protocol_needs(lower: str, upper: str) -> None:
    """append < drain < step < pause lease < lock lease < hard limit < visibility timeout; equal is not less."""
    limit_s = getattr(Settings(), upper)

    with pytest.raises(InvalidInput) as refusal:
        Settings(**dict[str, Any]({lower: limit_s}))

    assert f"FERRY_{lower.upper()}" in str(refusal.value)
    assert f"FERRY_{upper.upper()}" in str(refusal.value)


@pytest.mark.parametrize("name", NUMBERS)
def test_no_number_may_be_negative(name: str) -> None:
    """The message names the variable to correct."""
    with pytest.raises(InvalidInput, match=f"FERRY_{name.upper()}"):
        Settings(**dict[str, Any]({name: -1}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_time_is_a_finite_number(value: float) -> None:
    """nan compares false with everything and slips through a check; inf is a wait without a deadline."""
    times: dict[str, Any] = dict.fromkeys(TIMES, value)

    with pytest.raises(InvalidInput) as refusal:
        Settings(**times)

    assert [name for name in TIMES if f"FERRY_{name.upper()}=" not in str(refusal.value)] == []


def test_every_mistake_is_reported_at_once() -> None:
    """Nobody restarts a process once per mistake."""
    with pytest.raises(InvalidInput) as refusal:
        Settings(
            cluster="has.dots", shards=0, logs=0, replicas=2, node_id="no spaces", snapshot_every=0, lock_lease_s=5.0
        )

    for name in ("has.dots", "FERRY_SHARDS", "FERRY_LOGS", "FERRY_REPLICAS", "no spaces", "FERRY_SNAPSHOT_EVERY"):
        assert name in str(refusal.value), name
    assert "FERRY_LOCK_LEASE_S" in str(refusal.value)


def test_a_mistake_is_reported_once() -> None:
    """A list of mistakes in which one stands twice makes people look for a second one."""
    with pytest.raises(InvalidInput) as refusal:
        Settings(shards=0)

    assert str(refusal.value).count("FERRY_SHARDS") == 1


def test_mistakes_of_type_and_of_range_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's mistakes come in one list, whichever check finds them."""
    monkeypatch.setenv("FERRY_SHARDS", "many")
    monkeypatch.setenv("FERRY_LOGS", "0")
    monkeypatch.setenv("FERRY_CLUSTER", "has.dots")

    with pytest.raises(InvalidInput) as refusal:
        Settings.load()

    for name in ("FERRY_SHARDS", "FERRY_LOGS", "has.dots"):
        assert name in str(refusal.value), name


def test_the_number_of_shards_has_an_upper_bound() -> None:
    """Beyond it the map would not fit a bucket; the bound itself is fine."""
    assert Settings(shards=MAX_SHARDS).shards == MAX_SHARDS
    with pytest.raises(InvalidInput, match="FERRY_SHARDS"):
        Settings(shards=MAX_SHARDS + 1)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each field is FERRY_<NAME>, converted to its type."""
    monkeypatch.setenv("FERRY_SHARDS", "16")
    monkeypatch.setenv("FERRY_APPEND_TIMEOUT_S", "1.5")
    monkeypatch.setenv("FERRY_ACTORS", "examples.flights, shop.carts")
    monkeypatch.setenv("FERRY_NATS_SYNC_ALWAYS", "false")

    settings = Settings.load()

    assert (settings.shards, settings.append_timeout_s, settings.nats_sync_always) == (16, 1.5, False)
    assert settings.actors == ("examples.flights", "shop.carts")


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Overrides that are None were not given."""
    (tmp_path / ".env").write_text("FERRY_SHARDS=8\nFERRY_LOGS=2\nFERRY_NODE_ID=from-file\n")
    monkeypatch.setenv("FERRY_LOGS", "3")
    monkeypatch.setenv("FERRY_NODE_ID", "from-environment")

    settings = Settings.load(node_id="from-options", shards=None)

    assert (settings.shards, settings.logs, settings.node_id) == (8, 3, "from-options")


def test_reading_a_file_leaves_the_environment_as_it_was(tmp_path: Path) -> None:
    """Two objects read from two files do not mix, and child processes inherit nothing by accident."""
    (tmp_path / "one").write_text("FERRY_SHARDS=8\n")
    (tmp_path / "two").write_text("FERRY_LOGS=2\n")
    before = dict(os.environ)

    one, two = Settings.load(tmp_path / "one"), Settings.load(tmp_path / "two")

    assert dict(os.environ) == before
    assert (one.shards, two.shards, two.logs) == (8, Settings().shards, 2)


def test_a_file_that_cannot_be_read_is_one_of_the_mistakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder, which containers make of a file that is not there; another encoding. Listed with the others."""
    monkeypatch.setenv("FERRY_LOGS", "0")
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes("FERRY_CLUSTER=zürich\n".encode("latin-1"))

    for name, reason in (("folder", "Is a directory"), ("latin", "it is not UTF-8")):
        with pytest.raises(InvalidInput) as refusal:
            Settings.load(tmp_path / name)

        assert f"{tmp_path / name} ({reason})" in str(refusal.value)
        assert "FERRY_LOGS=0" in str(refusal.value)
        with pytest.raises(InvalidInput, match=name):
            variables(tmp_path / name)


def test_variables_are_those_of_the_file_and_of_the_environment_which_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As written, whether they are settings or not; nobody else's."""
    (tmp_path / ".env").write_text("FERRY_FLOWER_PORT=5556\nFERRY_LOG=json\nSECRET=1\n")
    monkeypatch.setenv("FERRY_LOG", "console")

    assert variables() == {"FERRY_FLOWER_PORT": "5556", "FERRY_LOG": "console"}


def test_a_variable_that_is_empty_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files and shells have them: `FERRY_NATS_URL= ferry up` starts an embedded server."""
    monkeypatch.setenv("FERRY_NATS_URL", "")
    monkeypatch.setenv("FERRY_CLUSTER", "")

    assert Settings.load() == Settings()


@pytest.mark.parametrize(
    ("setting", "url", "said"),
    [
        ("nats_url", "nats://127.0.0.1:port", "its port must be a number"),
        ("nats_url", "nats://a:4222, tls://b:65536", "its port must be a number"),
        ("nats_url", "nats://me:sec/ret@a:4222", "in a password write / as %2F"),
        ("nats_url", "nats://me:sec[ret@a:4222", "in a user or a password are %5B and %5D"),
        ("nats_url", "nats://[::1", "[ and ] go around an IPv6 address"),
        ("redis_url", "redis://127.0.0.1:port/0", "its port must be a number"),
        ("redis_url", "redis://:secret@127.0.0.1/production", "the number of a database"),
        ("redis_url", "rediss://127.0.0.1:6379/-1", "the number of a database"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused_without_its_password(setting: str, url: str, said: str) -> None:
    """Before anything connects: clients take it for another place, or end in the middle of their start."""
    with pytest.raises(InvalidInput) as refusal:
        Settings(**dict[str, Any]({setting: url}))

    assert str(refusal.value).startswith(f"FERRY_{setting.upper()} is malformed: ")
    assert said in str(refusal.value)
    assert "sec" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "url"),
    [
        ("nats_url", "nats://a, b:4222, tls://me:secret@[::1]:4222,"),
        ("redis_url", "redis://"), ("redis_url", "redis://127.0.0.1"), ("redis_url", "redis://127.0.0.1:6379/"),
        ("redis_url", "rediss://:secret@h:1/15?ssl_cert_reqs=none"), ("redis_url", "unix:///run/redis.sock?db=1"),
    ],
)  # fmt: skip
def test_a_url_may_leave_out_what_has_a_default(setting: str, url: str) -> None:
    """Port, database and host, as the clients below understand it."""
    assert getattr(Settings(**dict[str, Any]({setting: url})), setting) == url


def test_an_override_is_checked_like_everything_else() -> None:
    """A mistake on the command line is a mistake."""
    with pytest.raises(InvalidInput, match="FERRY_SHARDS"):
        Settings.load(shards=0)


def test_the_subjects_are_those_of_the_cluster() -> None:
    """The number of logs reaches the names as well."""
    subjects = Settings(cluster="blue", logs=2).subjects

    assert (subjects.cluster, subjects.logs) == ("blue", 2)
