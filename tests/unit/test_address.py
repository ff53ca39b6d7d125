"""Addresses: what names an actor or a node, what does not, and that no name can reach another's subject."""

from __future__ import annotations

import pickle
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing import jsonlike
from routing.address import IDS_RECALLED, MAX_KEY_BYTES, ActorId, Recalled, check_node_id, shard_of
from routing.errors import InvalidInput

actor_types = st.from_regex(r"[a-z][a-z0-9_]{0,62}", fullmatch=True)
printable = st.characters(exclude_categories=["Cs"]).filter(lambda c: ord(c) >= 32 and ord(c) != 127)
special = st.sampled_from(".*>=/ $%_-")  # what means something to NATS, or to the escaping itself
keys = st.text(special | printable, min_size=1).filter(lambda key: len(key.encode()) <= MAX_KEY_BYTES)
actor_ids = st.builds(ActorId, actor_types, keys)


@given(actor_ids)
def test_an_actor_id_reads_back_from_its_text(actor: ActorId) -> None:
    """`parse` is the inverse of `str`, also when the key has slashes."""
    assert ActorId.parse(str(actor)) == actor


@given(actor_ids)
def test_an_actor_id_reads_back_from_its_token(actor: ActorId) -> None:
    """`from_token` is the inverse of `token`."""
    assert ActorId.from_token(actor.token) == actor


@given(actor_ids)
def test_a_token_is_one_plain_subject_token(actor: ActorId) -> None:
    """No dot, star, angle bracket or space gets through: no key can reach another subject."""
    assert re.fullmatch(r"[A-Za-z0-9_=-]+", actor.token)


@given(actor_ids)
def test_an_actor_id_survives_pickling_and_is_no_json(actor: ActorId) -> None:
    """Another process hashes text differently; and what would arrive as a list is refused."""
    assert pickle.loads(pickle.dumps(actor)) == actor
    with pytest.raises(TypeError):
        jsonlike.dumps({"actor": actor})


@given(st.sets(actor_ids, min_size=2))
def test_different_actors_have_different_tokens(actors: set[ActorId]) -> None:
    """Two actors never share a journal."""
    assert len({actor.token for actor in actors}) == len(actors)


@pytest.mark.parametrize(
    "text",
    ["", "aircraft", "/N1", "aircraft/", "Aircraft/N1", "1a/N1", "air-craft/N1", "aircraft/N\n1", "aircraft/\x7f",
     "aircraft/\ud800", "aircraft/" + "x" * 129, "aircraft/" + "é" * 65, "a" * 64 + "/N1", "aircraft\n/N1"],
)  # fmt: skip
def test_malformed_actor_ids_are_refused_in_one_line(text: str) -> None:
    """The message says what to write instead, and holds no raw control characters."""
    with pytest.raises(InvalidInput) as caught:
        ActorId.parse(text)

    assert str(caught.value).isprintable()


@pytest.mark.parametrize("token", ["", "aircraft", "=N1", "aircraft=", "aircraft==FF", "Aircraft=N1"])
def test_tokens_that_name_no_actor_are_refused(token: str) -> None:
    """Anything on the wire that `token` did not make."""
    with pytest.raises(InvalidInput):
        ActorId.from_token(token)


@given(actor_ids, st.integers(1, 65_536))
def test_every_actor_has_a_shard_within_the_cluster(actor: ActorId, shards_total: int) -> None:
    """The shard depends on nothing but the id and the number of shards."""
    assert 0 <= shard_of(actor, shards_total) < shards_total
    assert shard_of(actor, shards_total) == shard_of(ActorId.parse(str(actor)), shards_total)


def test_the_shard_of_a_known_actor_never_changes() -> None:
    """A changed hash would look for every actor's journal in another place: data loss by upgrade."""
    assert [shard_of(ActorId("aircraft", key), 256) for key in ("N14228", "N24211", "é/ü")] == [62, 226, 249]


def test_ten_thousand_actors_spread_evenly_over_the_shards() -> None:
    """No shard holds half as many again as the mean would let expect; 6 sigma of a uniform spread."""
    counts = Counter(shard_of(ActorId("aircraft", f"N{n}"), 64) for n in range(10_000))

    assert len(counts) == 64
    assert max(counts.values()) < 10_000 / 64 * 1.5


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}", fullmatch=True))
def test_well_formed_node_ids_are_taken_as_they_are(text: str) -> None:
    """Letters, digits, dashes and underscores, as hosts and pods are named."""
    assert check_node_id(text) == text


@pytest.mark.parametrize("text", ["", "-a", "_a", "a.b", "a b", "a*", "a>", "é", "a\n", "x" * 64])
def test_malformed_node_ids_are_refused(text: str) -> None:
    """A node id stands in subjects and keys, so nothing that has a meaning there may be in it."""
    with pytest.raises(InvalidInput, match="node id"):
        check_node_id(text)


def test_what_is_recalled_of_actors_is_bounded() -> None:
    """A process that talks to a million actors must not keep a million of them."""
    asked: list[ActorId] = []

    def work_out(actor: ActorId) -> int:
        asked.append(actor)
        return int(actor.key)

    recalled, actors = Recalled(work_out), [ActorId("cart", str(number)) for number in range(2 * IDS_RECALLED)]

    assert [recalled[actor] for actor in actors for _ in range(2)] == [n for n in range(len(actors)) for _ in range(2)]
    assert asked == actors  # the second time it is there still
    assert len(recalled) <= IDS_RECALLED
    assert recalled[actors[0]] == 0
