"""Everything on one machine: embedded NATS and Redis, and the processes of a local cluster."""

from workflows.local.binaries import nats_server_binary, redis_server_binary
from workflows.local.cluster import LocalCluster
from workflows.local.process import LocalProcess
from workflows.local.servers import EmbeddedServers
from workflows.local.up import run_up

__all__ = [
    "EmbeddedServers", "LocalCluster", "LocalProcess", "nats_server_binary", "redis_server_binary", "run_up",
]  # fmt: skip
