"""Failpoints: off by default, exact when armed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from routing.errors import InvalidInput, PermanentError
from routing.failpoints import Failpoints


@pytest.mark.parametrize("failpoints", [Failpoints(), Failpoints(""), Failpoints.from_environment({})])
def test_nothing_happens_when_off(failpoints: Failpoints) -> None:
    """Production passes every point unharmed."""
    for point in ("pause", "commit", "send.begin", ""):
        failpoints.hit(point)


def test_an_armed_point_refuses_every_time() -> None:
    """For good: a step that a retry does not get past."""
    failpoints = Failpoints("verify=error")

    for _ in range(3):
        with pytest.raises(PermanentError):
            failpoints.hit("verify")
    failpoints.hit("verify.end")
    failpoints.hit("commit")


def test_a_counted_point_fires_so_often_and_never_again() -> None:
    """Each point counts for itself."""
    failpoints = Failpoints("verify=error*2,commit=error*1")

    for _ in range(2):
        with pytest.raises(PermanentError):
            failpoints.hit("verify")
    failpoints.hit("verify")
    with pytest.raises(PermanentError):
        failpoints.hit("commit")
    failpoints.hit("commit")


def test_points_are_armed_by_the_environment() -> None:
    """FERRY_FAILPOINTS, as `ferry node` sees it."""
    with pytest.raises(PermanentError):
        Failpoints.from_environment({"FERRY_FAILPOINTS": "send.begin=error*1"}).hit("send.begin")


@pytest.mark.parametrize(
    "specification",
    ["verify", "verify=", "=error", "verify=explode", "verify=error*x", "verify=error*", "verify=error*-1",
     "verify=error*0", "verify=error,,commit=error,x"],
)  # fmt: skip
def test_a_malformed_specification_is_refused_at_start_up(specification: str) -> None:
    """A typo must not make a nemesis test pass because nothing ever failed."""
    with pytest.raises(InvalidInput):
        Failpoints(specification)


def test_a_kill_point_is_a_sigkill() -> None:
    """No handler runs, no file is flushed: what a power cut leaves."""
    program = "from routing.failpoints import Failpoints\nFailpoints('commit=kill').hit('commit')\nprint('alive')"

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30, check=False)

    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b""
