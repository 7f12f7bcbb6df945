"""The environment of a Ray that is started for a service."""

import socket


def fast_environment(folder: str) -> dict[str, str]:
    """HAProxy before the gateway and gRPC behind it, which together take a third of the time.

    The files of HAProxy are in a folder of their own and its ports are free ones, so that a machine can have several services. When the
    service ends it does not wait for load balancers.
    """
    ports = [str(_free_port()) for _ in range(2)]
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.5",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg", "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock", "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state", "RAY_SERVE_HAPROXY_STATS_PORT": ports[0], "RAY_SERVE_HAPROXY_METRICS_PORT": ports[1],
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])
