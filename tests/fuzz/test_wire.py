"""Every message and stored document: read as it was written, and refused in good order when it is anything else."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
from hypothesis import given

from tests.fuzz.effort import fuzz, one
from tests.fuzz.refusals import assert_orderly
from tests.fuzz.strategies import ODD_VALUES, garbage, with_each_field_odd
from tests.fuzz.tally import TALLY
from tests.fuzz.wires import WIRES, Wire

# Reading JSON of empty lists takes some fifty times its bytes; naming what is wrong with each, up to three hundred.
ALLOCATED_PER_BYTE, ALLOCATED_AT_LEAST = 500, 2**20

every_wire = pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.name.replace(" ", "_"))


@every_wire
def test_what_is_written_is_read_as_it_was(wire: Wire) -> None:
    """Reading is the inverse of writing, for everything that Ferry's own code can write."""

    @fuzz
    @given(wire.values)
    def run(value: Any) -> None:
        TALLY.tried(f"{wire.name} written")
        assert wire.shape(wire.read(wire.write(value))) == wire.shape(value)

    run()


@every_wire
def test_garbage_is_refused_with_the_promised_error_or_is_well_formed(wire: Wire) -> None:
    """Only the errors the reader names rise, each with one line of bounded length; memory stays in proportion.

    What is damaged and accepted all the same must be a full value: it can be written, and is then read as the same.
    So nothing half-read goes on into the process.
    """

    outcomes = set[bool]()

    @fuzz
    @given(garbage(wire.payloads))
    def run(payload: bytes) -> None:
        TALLY.tried(f"{wire.name} damaged")
        outcomes.add(_read_in_modest_space(wire, payload))

    run()

    assert outcomes == {True, False}  # or the examples would say less than they seem to


@every_wire
def test_odd_json_is_no_exception(wire: Wire) -> None:
    """The values that readers fall over most often, all of them on every run: as a whole, and in place of any field."""

    @one
    @given(wire.payloads)
    def run(payload: bytes) -> None:
        for odd in with_each_field_odd(payload):
            _read_in_good_order(wire, odd)

    run()

    for payload in [*ODD_VALUES, b"", b"\n", b"{}\n{}"]:
        _read_in_good_order(wire, payload)


def _read_in_modest_space(wire: Wire, payload: bytes) -> bool:
    tracemalloc.start()
    try:
        return _read_in_good_order(wire, payload)
    finally:
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most_bytes <= ALLOCATED_AT_LEAST + ALLOCATED_PER_BYTE * len(payload)


def _read_in_good_order(wire: Wire, payload: bytes) -> bool:
    """Whether it was read; else it was refused as promised."""
    try:
        value = wire.read(payload)
    except wire.refusals as error:
        TALLY.refused(error)
        assert_orderly(error)
        return False
    TALLY.read += 1
    assert wire.shape(wire.read(wire.write(value))) == wire.shape(value)
    return True
