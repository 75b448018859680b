"""What runs under a `RayGrid`: messages go to free workers, replies lie ready, lost workers are replaced and their messages redone."""

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any
from uuid import uuid4

import ray
from flwr.app import Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from clients.identity import number
from clients.lanes import Lanes, MessageLost, Parcel
from clients.ray_crew import FOLLOW_SECONDS, Crew

LOOK_SECONDS = 5.0  # Ray tells when a worker is done; how often to look all the same, should it have failed to
SHORT_SECONDS = 0.1  # how soon to look again after a deadline that passed just as a reply came
SETTLE_SECONDS = 20.0  # rounds that are dealt to the workers that are up begin when none has come for so long, or all are up


@dataclass(frozen=True, eq=False)
class Flight:
    """A message that a worker is at: what its reply will be, and since when."""

    worker: int
    parcel: Parcel
    reply: Any
    since: float


@dataclass(frozen=True, eq=False)
class Landed:
    """A reply that nobody has taken yet: the message itself, or where it is on the cluster."""

    parcel: Parcel
    reply: Any


class Dispatcher:
    """Hands messages out in a thread of its own, whether or not the server is waiting.

    Args:
        crew: the workers.
        pinned: whether each worker has a node of its own.
        deadline: seconds that a worker may take over one message, twice as many each time it is done again; None: any time.
        retries: so often a message whose worker was lost is done again.

    Attributes:
        changed: guards all that follows, and tells of what happened.
        crew: the workers.
        pinned: whether each worker has a node of its own.
        run_id: Flower's number of the run; states of nodes of another one are not kept.
        states: what nodes keep, by node.
    """

    def __init__(self, crew: Crew, *, run_id: int, pinned: bool, deadline: float | None, retries: int) -> None:
        self.changed = threading.Condition()
        self.crew, self.pinned, self.run_id = crew, pinned, run_id
        self.states: dict[int, RecordDict] = {}
        self._deadline, self._retries = deadline, retries
        self._lanes = Lanes(pinned=pinned)
        self._flights: dict[Any, Flight] = {}
        self._awaited: set[str] = set()
        self._landed: dict[str, Landed] = {}  # in order of arrival
        self._redone: list[str] = []
        self._heard = SimpleQueue[tuple[Any, Future[Any]] | None]()  # what workers are done with; None: there may be a new deadline
        self._look = 0.0  # when to look for what nobody told of
        self._asked = set[Any]()  # of workers that are starting, what they were listened for
        self._closed = False
        self._failure: BaseException | None = None
        for worker in crew.tend():
            self._lanes.expect(worker)
        self._thread = threading.Thread(target=self._serve, name="ray-grid", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop handing messages out."""
        with self.changed:
            self._closed = True
            self._heard.put(None)
            self.changed.notify_all()
        self._thread.join()
        self._flights.clear()

    def check(self) -> None:
        """Refuse to go on after the end, or where Ray has failed."""
        if self._closed:
            raise RuntimeError("Expected an open RayGrid, got a closed one. Use it inside its `with` block.")
        if self._failure is not None:
            raise RuntimeError(f"Ray failed under this grid: {self._failure!r}. Close the grid and start a new one.") from self._failure

    def settle(self) -> None:
        """Wait for the first workers: till all are up, or one is and nobody else has come for a while.

        Raises:
            RuntimeError: none can be started.
        """
        self.up()
        crew, came = self.crew, 0
        with self.changed:
            while crew.starting and len(crew.posts) > came:
                came = len(crew.posts)
                self.changed.wait_for(partial(self._settled, came), SETTLE_SECONDS)

    def up(self) -> list[int]:
        """Return the numbers of the workers that are up; wait until one is.

        Raises:
            RuntimeError: none can be started, or the grid was closed.
        """
        with self.changed:
            self.changed.wait_for(lambda: self.crew.posts or self._over)
            self.check()
            return sorted(self.crew.posts)

    def submit(self, parcels: Sequence[Parcel]) -> None:
        """Queue messages."""
        with self.changed:
            self.check()
            self._awaited.update(parcel.id for parcel in parcels)
            for parcel in parcels:
                self._lanes.push(parcel)
            self._dispatch()
            self.changed.notify_all()

    def ready(self, wanted: set[str], most: int | None = None) -> list[Landed]:
        """Return replies that are there and forget them, in order of arrival."""
        with self.changed:
            self.check()
            found = [message_id for message_id in self._landed if message_id in wanted][:most]
            return [self._landed.pop(message_id) for message_id in found]

    def first(self, wanted: set[str], timeout: float | None) -> Landed | None:
        """Wait for the next reply, and return it; None after `timeout` seconds."""
        with self.changed:
            self.changed.wait_for(lambda: self._over or not wanted.isdisjoint(self._landed), timeout)
            return next(iter(self.ready(wanted, 1)), None)

    def fetch(self, landed: Landed) -> Message | None:
        """Return a worker's reply, or an error reply if it has none; None where it was lost with its Ray node, and is to come again."""
        if isinstance(landed.reply, Message):
            return landed.reply
        try:
            reply: Message = ray.get(landed.reply)
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayTaskError) or landed.parcel.node in self.states:  # no state may count twice
                return _error(landed.parcel, ErrorCode.UNKNOWN, f"The reply to this message was lost: {error}")
            with self.changed:
                self._awaited.add(landed.parcel.id)
                self._again(landed.parcel, f"{error}\nThe reply was lost with its Ray node.", holds=False)
            return None
        number(reply, str(uuid4()))
        return reply

    def forget(self, message_ids: set[str]) -> None:
        """Drop messages that no worker has begun; let the others run to their end, unheard."""
        with self.changed:
            self._awaited -= message_ids
            self._lanes.drop(message_ids)
            for message_id in message_ids & self._landed.keys():
                del self._landed[message_id]

    def take_faults(self) -> tuple[int, list[str]]:
        """Return how many workers were replaced since the last time, and the ids of the messages that were done again, once each time."""
        with self.changed:
            replaced, self.crew.replaced = self.crew.replaced, 0
            redone, self._redone = self._redone, []
            return replaced, redone

    @property
    def _over(self) -> bool:
        return self._closed or self._failure is not None

    def _settled(self, came: int) -> bool:
        return self._over or not self.crew.starting or len(self.crew.posts) > came

    def _dispatch(self) -> None:
        for worker, parcel in self._lanes.pairs():
            run = self.crew.actors[worker].run
            state, reply = run.remote(parcel.message, self.states.get(parcel.node), parcel.names, *parcel.records)
            self._flights[state] = Flight(worker, parcel, reply, time.monotonic())
            self._listen_for(state)
            if self._deadline is not None:
                self._heard.put(None)

    def _listen_for(self, ref: Any) -> None:
        # Ray calls back on a thread that it has work for itself. To ask it every tenth of a second takes a hundredth of two cores.
        heard = self._heard  # not all of this, for as long as nobody calls
        ref.future().add_done_callback(lambda told: heard.put((ref, told)))

    def _serve(self) -> None:
        try:
            while not self._closed:
                with self.changed:
                    self.crew.tend()
                    for ref in self.crew.starting.keys() - self._asked:
                        self._listen_for(ref)
                    self._asked = set(self.crew.starting)
                    patience = self._patience()
                for ref, told in self._hear(patience):
                    if ref in self._flights:
                        self._land(ref, told)
                    elif ref in self.crew.starting:
                        self._welcome(ref)
                self._lose_late()
        except Exception as error:  # noqa: BLE001  told to the driver, which waits
            with self.changed:
                self._failure = error
                self.changed.notify_all()

    def _patience(self) -> float:
        """Return how long to wait for workers before time alone changes something."""
        left = [flight.since + self._limit(flight) - time.monotonic() for flight in self._flights.values()]
        return min(LOOK_SECONDS, FOLLOW_SECONDS if self.crew.restless else math.inf, max(SHORT_SECONDS, min(left, default=math.inf)))

    def _limit(self, flight: Flight) -> float:
        # Twice as long each time, as a new worker has more to do at first: it builds its task.
        return math.inf if self._deadline is None else self._deadline * 2.0**flight.parcel.losses

    def _hear(self, patience: float) -> list[tuple[Any, "Future[Any] | None"]]:
        """Return what a worker is done with, and what Ray said of it; from time to time, and after so many seconds, whatever there is."""
        found = list[tuple[Any, Future[Any] | None]]()
        with suppress(Empty):
            heard = self._heard.get(timeout=patience)
            found += [] if heard is None else [heard]
            if time.monotonic() < self._look:
                return found
        self._look = time.monotonic() + LOOK_SECONDS
        with self.changed:
            waited = [ref for ref in (*self._flights, *self.crew.starting) if not found or ref is not found[0][0]]
        # Replies stay where they are until they are taken: fetched ahead, those of many workers would fill the server's memory.
        there = ray.wait(waited, num_returns=len(waited), timeout=0, fetch_local=False)[0] if waited else []
        return [*found, *((ref, None) for ref in there)]

    def _lose_late(self) -> None:
        with self.changed:
            for ref, flight in list(self._flights.items()):
                limit = self._limit(flight)
                if time.monotonic() - flight.since > limit and not ray.wait([ref], timeout=0, fetch_local=False)[0]:
                    self._lose(ref, f"took over {limit:g} s over this message; where nothing hangs, raise the deadline.")

    def _welcome(self, ref: Any) -> None:
        with self.changed:
            number = self.crew.starting[ref]
            if self.crew.arrived(ref) is None:
                self._lanes.leave(number)  # it may never come
            else:
                self._lanes.expect(number)
                self._lanes.free(number)
            self._dispatch()
            self.changed.notify_all()

    def _land(self, ref: Any, told: "Future[Any] | None") -> None:
        """Take what a worker left of a node, and let the next messages go before anybody takes its reply."""
        flight, state = self._flights[ref], None
        try:
            state, reply = ray.get(ref) if told is None else told.result(), flight.reply
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MessageLost):
                self._lose(ref, "gave this message back.", error.cause)
                return
            reply = _error(flight.parcel, ErrorCode.UNKNOWN, f"Ray could not run this message or return its reply: {error}")
        except ray.exceptions.RayError as error:
            self._lose(ref, "died, perhaps for want of memory.", error)
            return
        with self.changed:
            del self._flights[ref]
            self._lanes.free(flight.worker)
            if state is not None and flight.parcel.message.metadata.run_id == self.run_id:
                self.states.pop(flight.parcel.node, None)
                if state:
                    self.states[flight.parcel.node] = state
            self._lanes.release(flight.parcel.node)
            self._dispatch()
            self._answer(flight.parcel, reply)

    def _lose(self, ref: Any, what: str, error: BaseException | None = None) -> None:
        """Replace a worker that died, hangs or gave up, and have its message done again."""
        with self.changed:
            flight = self._flights.pop(ref)
            name = self.crew.name(flight.worker)
            self.crew.lose(flight.worker)
            self._lanes.leave(flight.worker)
            self._again(flight.parcel, (f"{error}\n" if error else "") + f"{name[0].upper()}{name[1:]} {what}")

    def _again(self, parcel: Parcel, why: str, *, holds: bool = True) -> None:
        """Have a message done again, or say why not; `holds`: its node is still at work with it."""
        if parcel.id in self._awaited and parcel.losses < self._retries:
            self._redone.append(parcel.id)
            self._lanes.again(replace(parcel, losses=parcel.losses + 1), holds=holds)
        else:
            if holds:
                self._lanes.release(parcel.node)
            reason = f"{why} {parcel.losses + 1} workers in turn were lost over this message."
            self._answer(parcel, _error(parcel, ErrorCode.CLIENT_APP_CRASHED, reason))
        self._dispatch()
        self.changed.notify_all()

    def _answer(self, parcel: Parcel, reply: Any) -> None:
        if parcel.id in self._awaited:
            self._awaited.remove(parcel.id)
            self._landed[parcel.id] = Landed(parcel, reply)
        self.changed.notify_all()


def _error(parcel: Parcel, code: int, reason: str) -> Message:
    return Message(Error(code, reason), reply_to=parcel.message)
