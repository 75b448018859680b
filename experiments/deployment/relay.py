"""A relay that counts: it passes bytes between SuperNodes and their SuperLink, TLS as it is, and says how many went each way."""

import asyncio
import threading
from types import TracebackType
from typing import Self

CHUNK = 1 << 16


class Relay:
    """Listens on a port of this machine and passes what comes to another one, on a thread of its own.

    Args:
        port: where it listens, on 127.0.0.1; 0: any that is free.
        target: the port that it passes to, on 127.0.0.1.

    Attributes:
        up: bytes to the target so far, with all that TLS and HTTP add.
        down: bytes from it.
        connections: how many were made.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.up = self.down = self.connections = 0
        self.port, self._target = port, target
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="relay", daemon=True)

    def __enter__(self) -> Self:
        """Listen; `port` is the real one from now on."""
        self._thread.start()
        if not self._ready.wait(10):
            raise OSError(f"The relay could not listen on port {self.port}; is it taken?")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Cut all connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, "127.0.0.1", self.port))
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:  # the SuperLink is down: the node tries again
            writer.close()
            return
        await asyncio.gather(self._pass(reader, far_writer, "up"), self._pass(far_reader, writer, "down"))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        try:
            while chunk := await reader.read(CHUNK):
                setattr(self, way, getattr(self, way) + len(chunk))
                writer.write(chunk)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
