"""The relay passes what it gets, counts it, and waits for a target that is down."""

import socket
import threading

from experiments.deployment.loopback import free_port
from experiments.deployment.relay import HOST, Relay


def answer_once(port: int) -> threading.Thread:
    """Serve one connection that is answered by what came twice."""

    def serve() -> None:
        with socket.create_server((HOST, port)) as server:
            connection, _ = server.accept()
            with connection:
                while chunk := connection.recv(1 << 16):
                    connection.sendall(2 * chunk)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def test_bytes_are_passed_and_counted_each_way_also_once_the_target_is_up() -> None:
    port = free_port()
    with Relay(port) as relay, socket.create_connection((HOST, relay.port), timeout=10) as near:
        near.sendall(b"x" * 100_000)
        thread, got = answer_once(port), 0
        while got < 200_000:
            got += len(near.recv(1 << 16))
        near.close()
        thread.join(10)
        assert not thread.is_alive()
        assert (relay.up, relay.down, relay.connections) == (100_000, 200_000, 1)


def test_open_connections_are_cut_at_the_end() -> None:
    with Relay(free_port()) as relay:
        near = socket.create_connection((HOST, relay.port), timeout=10)
    with near:
        assert near.recv(1) == b""
