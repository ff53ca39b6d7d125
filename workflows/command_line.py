"""What every `ferry` command shares: options, settings, and how an error becomes one line and an exit code."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

import click

from routing.errors import FerryError, InDoubt, InvalidInput, Rejected
from routing.jsonlike import shown
from routing.logs import choices, configure_logging
from routing.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

FAILED, WRONG_USAGE, TIMED_OUT, INTERRUPTED = 1, 2, 3, 130


class Failure(click.ClickException):
    """A command that failed, with what it prints and its exit code. `speaker` says whose word the message is."""

    def __init__(self, message: str, exit_code: int, *, speaker: str = "ferry") -> None:
        super().__init__(message)
        self.code = exit_code
        self.speaker = speaker

    @classmethod
    def of(cls, error: Exception) -> Failure:
        from workflows.progress import StillRunning

        match error:
            case InvalidInput():
                return cls(str(error), WRONG_USAGE)
            case StillRunning() | InDoubt():
                return cls(str(error), TIMED_OUT)
            case Rejected():
                return cls(str(error), FAILED, speaker="Rejected")  # the actor's answer, no fault of the tool
            case FerryError():
                return cls(str(error), FAILED)
        said = " ".join(str(error).split())
        return cls(f"internal error: {type(error).__name__}: {said} (ferry --debug ... shows where)", FAILED)


class FerryGroup(click.Group):
    """Commands in the order of their definition; errors as one line on stderr; a traceback only with --debug."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except Exception as error:  # the top of the process: everything ends as one line and an exit code
            if context.params.get("debug"):
                traceback.print_exc()
            raise Failure.of(error) from error

    def main(self, *arguments: Any, standalone_mode: bool = True, **options: Any) -> Any:
        options.setdefault("prog_name", "ferry")  # also when run as `python -m workflows.cli`
        run_command: Callable[..., Any] = super().main
        if not standalone_mode:
            return run_command(*arguments, standalone_mode=False, **options)
        try:
            code = run_command(*arguments, standalone_mode=False, **options)
        except Failure as error:
            _end(error.format_message(), error.code, speaker=error.speaker)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx is not None else "ferry"
            _end(f"{error.format_message()} Try `{command} --help`.", WRONG_USAGE)
        except click.ClickException as error:
            _end(error.format_message(), FAILED)
        except click.Abort:
            _end("interrupted; what was asked for goes on", INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has seen enough. Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        sys.exit(code if isinstance(code, int) else 0)


def _end(message: str, code: int, *, speaker: str = "ferry") -> NoReturn:
    click.echo(f"{speaker}: {message}", err=True)
    sys.exit(code)


def load_settings(*, log_level: str = "warning", **overrides: Any) -> Settings:
    """Settings of this process, and logging as they and the environment say. Raises InvalidInput."""
    settings = read_settings(log_level, **overrides)
    configure_logging(log_level)
    return settings


def read_settings(log_level: str = "warning", **overrides: Any) -> Settings:
    """The settings of this process. Raises InvalidInput listing every mistake in them and in those of logging."""
    mistakes = ""
    try:
        settings = Settings.load(**overrides)
    except InvalidInput as error:
        mistakes = str(error)
    try:
        choices(log_level)
    except InvalidInput as error:
        if str(error) not in mistakes:  # an .env that cannot be read is a mistake in both
            mistakes = "; ".join(filter(None, (mistakes, str(error))))
    if mistakes:
        raise InvalidInput(mistakes)
    return settings


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


# -- options -----------------------------------------------------------------------------------------------------------
def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")(command)


def wait_options(default_timeout_s: float = 120.0) -> Callable[[F], F]:
    """`--wait` and `--timeout`."""

    def add(command: F) -> F:
        timeout = click.option(
            "--timeout", "timeout_s", type=POSITIVE, default=default_timeout_s, show_default=True, metavar="SECONDS",
            help="How long --wait waits; what was asked for goes on after that.",
        )  # fmt: skip
        return click.option("--wait", is_flag=True, help="Return when it is done.")(timeout(command))

    return add


class _Positive(click.FloatRange):
    """A number above 0. Neither nan, which is in every range, nor infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


POSITIVE = _Positive(min=0, min_open=True)


# -- arguments ---------------------------------------------------------------------------------------------------------
LEAST_INT, MOST_INT = -(2**63), 2**64 - 1  # of a message: the next one would arrive as a float near it


def parse_arguments(given: tuple[str, ...]) -> dict[str, Any]:
    """`["distance=1400", "dest=ORD"]` -> `{"distance": 1400, "dest": "ORD"}`. Raises InvalidInput."""
    arguments: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidInput(f"argument {text!r} is malformed: write KEY=VALUE, e.g. distance=1400")
        if name in arguments:
            raise InvalidInput(f"argument {name!r} is given twice: give it once")
        arguments[name] = _value(name, value)
    return arguments


def _value(name: str, text: str) -> Any:
    """What is written in JSON, else the text itself. Raises InvalidInput for a number that no message can carry."""
    unfit: list[str] = []

    def integer(digits: str) -> int:
        if len(digits) > len(str(LEAST_INT)) or not LEAST_INT <= int(digits) <= MOST_INT:
            unfit.append(digits)
            return 0
        return int(digits)

    def fraction(digits: str) -> float:
        if not math.isfinite(float(digits)):
            unfit.append(digits)
        return float(digits)

    try:
        value = json.loads(text, parse_int=integer, parse_float=fraction, parse_constant=unfit.append)
    except (json.JSONDecodeError, RecursionError):
        return text
    if unfit:
        raise InvalidInput(
            f"argument {name!r} has {shown(unfit[0])}, which is no finite number of up to 64 bits: correct it, or write"
            f" {name}='\"...\"' to send text"
        )
    return value
