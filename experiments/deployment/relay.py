"""A relay that counts: it passes bytes between SuperNodes and their SuperLink, TLS as it is, and says how many went each way."""

import asyncio
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

HOST = "127.0.0.1"
CHUNK = 1 << 16
SECONDS_BETWEEN_TRIES = 0.2
SECONDS_TO_ACCEPT = 0.1


class Relay:
    """Listens on a port of this machine and passes what comes to another one, on a thread of its own.

    Args:
        target: the port that it passes to.
        port: where it listens; 0: any that is free.

    Attributes:
        up: bytes to the target so far, with all that TLS and HTTP add.
        down: bytes from it.
        connections: how many were made.
    """

    def __init__(self, target: int, port: int = 0) -> None:
        self.up = self.down = self.connections = 0
        self.port, self._target = port, target
        self._ready, self._tasks = threading.Event(), set[asyncio.Task[None]]()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="relay", daemon=True)

    def __enter__(self) -> Self:
        """Listen; `port` is the real one from now on."""
        self._thread.start()
        if not self._ready.wait(10):
            raise OSError(f"The relay could not listen on port {self.port}; is it taken?")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Cut all connections."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connected, HOST, self.port)
        self.port = int(server.sockets[0].getsockname()[1])
        self._ready.set()
        await self._stop.wait()
        await asyncio.sleep(SECONDS_TO_ACCEPT)  # what has come is let in, so that it can be cut
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.get_running_loop().create_task(self._between(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _between(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far = None
        try:
            far = await self._reach()
            await asyncio.gather(self._pass(reader, far[1], "up"), self._pass(far[0], writer, "down"))
        finally:
            for end in (writer, *([far[1]] if far else [])):
                end.close()
                with suppress(OSError):
                    await end.wait_closed()

    async def _reach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return a connection to the target, once it is up: hung up on, a SuperNode would take that for a broken TLS, and end."""
        while True:
            with suppress(OSError):
                return await asyncio.open_connection(HOST, self._target)
            await asyncio.sleep(SECONDS_BETWEEN_TRIES)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                setattr(self, way, getattr(self, way) + len(chunk))
                writer.write(chunk)
                await writer.drain()
        writer.close()  # the other end has nothing more to say
