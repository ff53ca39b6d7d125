"""NATS names: distinct, parseable, and closed against what people put into keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.address import ActorId
from routing.errors import InvalidInput
from routing.settings import Settings
from routing.subjects import (
    Subjects,
    actor_key,
    actor_of_key,
    kv_stream,
    kv_subject,
    node_key,
    shard_key,
    shard_of_key,
    unit_in_words,
)

KEYS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=30)


@pytest.mark.parametrize("cluster", ["", "a.b", "a b", "*", ">", "a\n", "ä" * 40, "x" * 200])
def test_a_cluster_name_that_a_subject_cannot_hold_is_refused(cluster: str) -> None:
    """A wildcard or a dot in the name would reach into other clusters."""
    with pytest.raises(InvalidInput):
        Subjects(cluster)


@given(KEYS, KEYS)
def test_no_key_reaches_another_actors_subject(one: str, other: str) -> None:
    """Whatever is in a key, the subject has the same number of tokens, no wildcard, and only equal ids share it."""
    subjects = Subjects("c")

    first, second = (subjects.events(3, ActorId("t", key)) for key in (one, other))

    assert first.count(".") == subjects.events(3, ActorId("t", "plain")).count(".")
    assert not set(first) & set("*> \t")
    assert (first == second) == (one == other)


@given(st.integers(0, 65535), st.integers(1, 64))
def test_an_event_subject_is_taken_by_exactly_the_log_of_its_shard(shard: int, logs: int) -> None:
    """Streams must not overlap, or JetStream refuses them, and no subject may be left without a stream."""
    subjects = Subjects("c", logs)
    subject = subjects.events(shard, ActorId("t", "k"))

    takers = [stream for stream, filter_ in subjects.log_streams() if subject.startswith(filter_.removesuffix(">"))]

    assert takers == [subjects.log_of(shard)]
    assert len(dict(subjects.log_streams())) == logs


@given(st.integers(0, 65535))
def test_a_shards_key_is_read_back(shard: int) -> None:
    """Key and shard tell the same."""
    assert shard_of_key(shard_key(shard)) == shard


@pytest.mark.parametrize(
    "key",
    [
        *("", "cluster", "suspended", "shard", "shard.", "shard.x", "shard.-1", "shard.1.2", "shards.1"),
        *("shard.\u00b2", "shard.\u0663", "shard. 1", "shard.1_0", "shard.01"),
    ],
)  # fmt: skip
def test_a_key_that_is_no_shards_is_none(key: str) -> None:
    """Only what `shard_key` wrote counts: two spellings of one shard would be two owners."""
    assert shard_of_key(key) is None


@given(KEYS)
def test_an_actors_key_is_read_back(key: str) -> None:
    """Key and actor tell the same, and no shard's key is mistaken for it; NATS takes it as one token."""
    actor = ActorId("t", key)

    assert actor_of_key(actor_key(actor)) == actor
    assert shard_of_key(actor_key(actor)) is None
    assert actor_key(actor).count(".") == 1
    assert not set(actor_key(actor)) & set("*> \t/")


@given(st.text(max_size=20))
def test_whatever_is_read_as_an_actors_key_is_written_so(token: str) -> None:
    """Two spellings of one actor would be two owners."""
    actor = actor_of_key(f"actor.{token}")

    assert actor is None or actor_key(actor) == f"actor.{token}"


@pytest.mark.parametrize(
    "key",
    [
        *("", "cluster", "shard.1", "actor", "actor.", "actor.t", "actor.t=", "actor.=k", "actor.T=k", "actors.t=k"),
        *("actor.t=k.l", "actor.t=k l", "actor.t=\u00e9", "actor.t==6B", "actor.t==c3=a9", "actor.t==C3"),
        *("actor.t==00", "actor.t==", "actor.t=k/l", "actor.t=" + "k" * 129),
    ],
)  # fmt: skip
def test_a_key_that_is_no_actors_is_none(key: str) -> None:
    """What `actor_key` did not write, or what is not an actor at all."""
    assert actor_of_key(key) is None


@given(KEYS)
def test_an_actor_in_words_is_its_id(key: str) -> None:
    """What `ferry migrate` takes."""
    actor = ActorId("t", key)

    assert ActorId.parse(unit_in_words(actor_key(actor))) == actor


@pytest.mark.parametrize(("unit", "words"), [("shard.17", "shard/17"), ("actor.cart=a=2Fb", "cart/a/b"), ("x", "x")])
def test_a_unit_in_words_is_what_users_write(unit: str, words: str) -> None:
    """A shard with a slash, as in the command line's answers."""
    assert unit_in_words(unit) == words


def test_clusters_share_no_name() -> None:
    """Two clusters on one NATS never hear each other."""
    one, two = Subjects("one"), Subjects("two")

    for name in ("map_bucket", "lease_bucket"):
        assert getattr(one, name) != getattr(two, name)
    assert one.command("a", "s") != two.command("a", "s")
    assert one.control("a", "pause") != two.control("a", "pause")
    assert one.transfer("a", "m") != two.transfer("a", "m")
    assert not dict(one.log_streams()).keys() & dict(two.log_streams()).keys()


def test_the_buckets_are_ordinary_nats_buckets() -> None:
    """`nats kv ls` must find them: stream KV_<bucket>, subjects $KV.<bucket>.<key>."""
    subjects = Settings().subjects

    assert kv_stream(subjects.map_bucket) == f"KV_{subjects.map_bucket}"
    assert kv_subject(subjects.map_bucket, shard_key(7)) == "$KV.ferry-default-map.shard.7"
    assert kv_subject(subjects.map_bucket, actor_key(ActorId("cart", "7"))) == "$KV.ferry-default-map.actor.cart=7"
    assert kv_subject(subjects.lease_bucket, node_key("a")) == "$KV.ferry-default-leases.node.a"
