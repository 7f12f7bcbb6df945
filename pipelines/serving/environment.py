"""The environment of a service: its token, and what a Ray that is started for it is told."""

import contextlib
import hashlib
import ipaddress
import os
import random
import resource
import socket

TOKEN = "HASHBRIDGE_TOKEN"
CONNECTIONS = 4096  # that HAProxy holds at most
PORTS = range(20000, 30000)  # above those of Ray's workers and below those of its replicas and those that the system gives to connections


def fast_environment(folder: str) -> dict[str, str]:
    """HAProxy before the gateway and gRPC behind it, which together take a third of the time.

    The files of HAProxy are in a folder of their own and its ports are free ones, so that a machine can have several services. It takes two
    and a half open files a connection, and does not start where it may not have them. When the service ends it does not wait for load
    balancers. gRPC would send what the deployments say to each other to the HTTP proxy of the environment.
    """
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    connections = CONNECTIONS if files == resource.RLIM_INFINITY else max(1, min(CONNECTIONS, (files - 100) * 2 // 5))
    ports = [str(port) for port in free_ports(4)]
    return {
        "grpc_proxy": "", "RAY_SERVE_HAPROXY_MAXCONN": str(connections), "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg", "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state", "RAY_SERVE_HAPROXY_STATS_PORT": ports[0], "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports[2], "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": ports[3],
    }  # fmt: skip


def free_ports(count: int) -> list[int]:
    """Different ports at which nothing listens, and which no connection is given before a server takes them.

    Raises:
        ValueError: there are fewer.
    """
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as opened, contextlib.suppress(OSError):
            opened.bind(("0.0.0.0", port))
            found.append(port)
        if len(found) == count:
            return found
    raise ValueError(f"of the ports from {PORTS[0]} to {PORTS[-1]} {len(found)} are free, but {count} are needed")


def hashed_token(needed: bool) -> str:
    """The SHA-256 of the environment's token, in hexadecimal; "" if there is none.

    Raises:
        ValueError: it is needed and not there, or too short.
    """
    token = os.environ.get(TOKEN, "")
    if needed and not token:
        raise ValueError(f"off this machine a token is needed: set {TOKEN} to a secret of at least 16 characters")
    if token and len(token) < 16:
        raise ValueError(f"{TOKEN} has {len(token)} characters, but must have at least 16")
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
