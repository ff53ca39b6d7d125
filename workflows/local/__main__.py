"""`python -m workflows.local nats|redis`: one embedded server in the foreground, for a line of the Procfile.

It becomes the server (exec), so signals and exit status are the server's own. The port is the configured URL's. When
that URL is not on this machine, or FERRY_EXTERNAL=1 says that somebody else runs the servers, there is nothing to
start: it then only waits to be stopped, since a Procfile's line that ends stops all the others.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from routing.errors import FerryError, InvalidInput, Unavailable
from routing.settings import Settings
from workflows.local.claim import Claim
from workflows.local.probe import DEFAULT_PORTS, address_of, port_is_free
from workflows.local.servers import nats_argv, nats_environment, redis_argv

_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def main(arguments: list[str]) -> int:
    try:
        if arguments not in (["nats"], ["redis"]):
            raise InvalidInput("usage: python -m workflows.local nats|redis")
        return _serve(arguments[0], Settings.load())
    except InvalidInput as error:
        print(f"ferry: {error}", file=sys.stderr)
        return 2
    except (FerryError, OSError) as error:
        print(f"ferry: {error}", file=sys.stderr)
        return 1


def _serve(server: str, settings: Settings) -> int:
    url = settings.nats_url if server == "nats" else settings.redis_url
    parts = address_of(url.split(",")[0])
    if parts.hostname not in _LOOPBACK or os.environ.get("FERRY_EXTERNAL") == "1":
        print(f"{server} is run by others, at {parts.hostname}: nothing to start", flush=True)
        stops = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        signal.sigwait(stops)
        return 0

    data_dir, port = Path(settings.data_dir).resolve(), parts.port or DEFAULT_PORTS[parts.scheme]
    if not port_is_free(port):
        variable = "FERRY_NATS_URL" if server == "nats" else "FERRY_REDIS_URL"
        raise Unavailable(
            f"port {port} is in use, so {server} cannot start on it: stop what listens there, set {variable} to "
            "another port, or say FERRY_EXTERNAL=1 to use the server that is there"
        )
    claim = Claim(data_dir, server)
    os.set_inheritable(claim.descriptor, True)  # the server holds it from here on, and its end frees it
    if server == "nats":
        argv = [
            *nats_argv(data_dir, port=port, sync_always=settings.nats_sync_always),
            "-l",
            str(data_dir / "nats.log"),
        ]
        environment = nats_environment(sync_always=settings.nats_sync_always)
    else:
        environment = dict(os.environ)
        argv = [*redis_argv(data_dir, port=port), "--logfile", str(data_dir / "redis.log")]
    print(f"{server} on port {port}; its log is {data_dir / server}.log", flush=True)
    os.execve(argv[0], argv, environment)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
