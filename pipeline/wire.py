"""JSON lines over TCP between the ranks' threads, and sockets that notice a dead machine.

A process that ends, however it ends, closes its sockets: the other side reads the end of the
stream at once. A machine that is gone closes nothing, so the operating system asks for an answer
now and then (TCP keepalive). Its kernel answers that, not its program: a process that is busy for
an hour inside one C call is never taken for dead.
"""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

_SEND_S = 5.0
"""Seconds that a send may wait for room; messages are small, so that there is room."""
_MAX_LINE = 1 << 20

Message = dict[str, Any]


class Wire:
    """One connection."""

    def __init__(self, connection: socket.socket, *, timeout_s: float) -> None:
        """Args: connection: a connected socket; timeout_s: silence of the other machine's kernel
        after which the connection breaks."""
        self.socket = connection
        self._buffer = b""
        self._lock = threading.Lock()
        connection.settimeout(_SEND_S)
        _notice_dead_machines(connection, timeout_s)

    def fileno(self) -> int:
        """For `select`."""
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message, from any thread.

        Raises:
            OSError: the connection is broken.
        """
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            self.socket.sendall(data)

    def receive(self) -> list[Message] | None:
        """What has arrived, once `select` says that something has; None at the stream's end.

        Raises:
            OSError: the connection is broken.
            ValueError: what came is no message of ours.
        """
        data = self.socket.recv(1 << 16)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _MAX_LINE:
            raise ValueError("a message without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()


def _notice_dead_machines(connection: socket.socket, timeout_s: float) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probe_s = max(1, round(timeout_s / 6))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 5)
    # Bytes that are on their way and not acknowledged, too.
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(timeout_s * 1000))


def listen(local_only: bool) -> socket.socket:
    """A listening socket at a free port: of this machine alone, or of all its addresses."""
    if local_only:
        return socket.create_server(("127.0.0.1", 0), backlog=4096)
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
        )
    return socket.create_server(("", 0), backlog=4096)


def connect(hosts: list[str], port: int, *, timeout_s: float) -> socket.socket:
    """Connect to the first of some names of a machine that answers.

    Raises:
        OSError: none does.
    """
    errors = []
    for host in hosts:
        try:
            return socket.create_connection((host, port), timeout=min(timeout_s, 10.0))
        except OSError as error:
            errors.append(f"{host}: {error}")
    raise OSError("; ".join(errors))
