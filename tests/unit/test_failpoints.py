"""Failpoints: off by default, exact when armed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from routing.errors import InvalidInput, PermanentError, Unavailable
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
    assert b"alive" not in ended.stdout


def test_a_stopped_process_stands_exactly_at_the_point_and_goes_on_when_told() -> None:
    """What a nemesis needs: time to strike somebody while the protocol stands there."""
    # given a process that stops itself
    program = "from routing.failpoints import Failpoints\nFailpoints('commit=stop').hit('commit')\nprint('went on')"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        # when it has, which the kernel tells its parent
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate(timeout=30)

    # then it had not gone on before it was told
    assert b"went on" in said
    assert process.returncode == 0


# -- points in a file ------------------------------------------------------------------------------------------------
def test_a_file_arms_and_disarms_points_of_a_running_process(tmp_path: Path) -> None:
    """What the file says when the point is passed holds."""
    file = tmp_path / "points"
    file.write_text("")
    failpoints = Failpoints(f"@{file}")

    failpoints.hit("commit")
    file.write_text("commit=error*1")
    with pytest.raises(PermanentError):
        failpoints.hit("commit")
    failpoints.hit("commit")
    file.write_text("verify=unavailable")
    with pytest.raises(Unavailable):
        failpoints.hit("verify")
    failpoints.hit("commit")
    file.write_text("")
    failpoints.hit("verify")


def test_counts_begin_anew_when_the_file_is_written_anew(tmp_path: Path) -> None:
    """So that a point can be armed again with the same words, by who passed none in between; a look changes nothing."""
    file = tmp_path / "points"
    file.write_text("commit=error*1")
    failpoints = Failpoints(f"@{file}")

    for _ in range(2):
        with pytest.raises(PermanentError):
            failpoints.hit("commit")
        failpoints.hit("commit")
        (tmp_path / "draft").write_text("commit=error*1")
        (tmp_path / "draft").replace(file)


def test_a_file_that_turns_malformed_or_goes_away_arms_nothing_and_is_reported_once(tmp_path: Path) -> None:
    """A running process is not harmed by somebody's typo, and does not hide it either."""
    file = tmp_path / "points"
    file.write_text("commit=error")
    failpoints = Failpoints(f"@{file}")

    with capture_logs() as logged:
        file.write_text("commit=explode")
        failpoints.hit("commit")
        failpoints.hit("commit")
        file.unlink()
        failpoints.hit("commit")
        failpoints.hit("commit")

    assert [entry["event"] for entry in logged] == ["failpoints ignored"] * 2


def test_a_file_that_is_not_there_is_refused_at_start_up(tmp_path: Path) -> None:
    """As any malformed specification: a nemesis that watches another file would never strike."""
    with pytest.raises(InvalidInput, match="create it"):
        Failpoints(f"@{tmp_path / 'points'}")
