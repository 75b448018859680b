"""`Fleet`: rounds of a method on real devices. What it sends is what simulations send; what comes back passes the gate first."""

import dataclasses
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TypeVar

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from clients import messages
from clients.asking import Asking
from clients.device import digest_of
from clients.gate import LARGEST_COUNTS, Asked, Cause, Gate, Rejected
from clients.link import Link
from clients.roster import NAME, Enrolled, Roster
from clients.signing import public_line
from fedclip.account import Account, BudgetSpent
from fedclip.codec import DenseCodec
from fedclip.collector import Collector, Contribution
from fedclip.config import DeploymentOptions
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.options import ConfigError
from fedclip.process import settle_process
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import Outcome, Plan, Released, WorkerError, begin, finish, replay
from fedclip.simulation import initial_params
from fedclip.site import Site, evaluate_units
from fedclip.tally import MOST_CHARACTERS, add_up
from fedclip.tasks.base import Counts, Task
from fedclip.tasks.build import TaskRecipe
from fedclip.update import Dense
from fedclip.wire import Wire
from strategies.device_evaluation import noised, pooled

SECONDS_BETWEEN_LOOKS = 0.5
"""Between two looks at who is there."""

TRIES = 3
"""A round without noise is begun so often, until users enough have answered."""

TIME_TO_LIVE = 7 * 24 * 3600.0
"""Seconds that a SuperLink keeps a message: so that a late reply is counted as one."""

Read = TypeVar("Read")


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A reply that was not taken, or a node that was not asked: which, when and why. For the operator, and nobody else."""

    round: int
    attempt: int
    node: str
    cause: Cause
    detail: str


class Fleet:
    """Rounds of a method on the nodes of a SuperLink that a roster names: a message for a few users of a node.

    Args:
        method: the method; its sampler is `Available`.
        task: the task, for its model and its held-out units; nothing is trained here.
        recipe: how every node builds the same task, on its own data.
        secret: the master secret of the random streams; empty: the operating system's generator, on every device as on the server.
        run: the name of the run.
        grid: the nodes.
        options: who may take part, and how long a round waits.
        device: where nodes train, and this process evaluates.
        account: what the releases are charged to; None without noise.
        rates: the metrics of the task that are between 0 and 1, where models are evaluated by the devices, on what they hold out; none:
            they are evaluated here, on what the task holds out.

    Attributes:
        state: the state after the last round.
        keep: makes what was released durable before the server step; None: nothing does.
        warn: is told of each rejection; None: nobody is.
        say: is told what a round waits for.
        rejected: how many replies were not taken, by cause.
    """

    command = "deployment"

    def __init__(
        self,
        method: Method,
        task: Task,
        recipe: TaskRecipe,
        secret: str,
        run: str,
        grid: Grid,
        options: DeploymentOptions,
        *,
        device: str = "cpu",
        account: Account | None = None,
        rates: tuple[str, ...] = (),
    ) -> None:
        settle_process()
        self.method, self.task, self.account, self.run = method, task, account, run
        self.layout = Layout.of(task.make_model())
        self.state = ServerState.initial(initial_params(task), method, self.layout)
        self.keep: Callable[[Released], None] | None = None
        self.warn: Callable[[Rejection], None] | None = None
        self.say: Callable[[str], None] = lambda text: None
        self.rejected: Counter[str] = Counter()
        self._recipe, self._secret, self._options, self._device, self._rates = recipe.to_json(), secret, options, device, rates
        self._link = Link(grid, options.deadline_seconds)
        self._asking = Asking(self._link, options.deadline_seconds, self._reject)
        self._nodes = 1
        self._taken: dict[int, tuple[int, int]] = {}
        self._accepted: tuple[int, ...] = ()
        self._names: dict[int, str] = {}
        self._left_out: dict[str, tuple[int, Cause]] = {}
        self._here: Site | None = None

    @property
    def workers(self) -> int:
        """How many nodes were there when they were last looked at: each trains on a machine of its own."""
        return self._nodes

    @property
    def remembered(self) -> list[list[int]]:
        """The round and the attempt of each user's last update that was taken: what of their devices' states counts. Plain data."""
        return [[user, *last] for user, last in sorted(self._taken.items())]

    @remembered.setter
    def remembered(self, taken: list[list[int]]) -> None:
        self._taken = {user: (round, attempt) for user, round, attempt in taken}

    def restore(self, state: ServerState) -> None:
        """Go on from another state."""
        self.state = state

    def replay(self, released: Released) -> Outcome:
        """Take the server step of a round that was released before; no device is asked."""
        return self._done(replay(self.method, self.state, self.layout, self._secret, self.run, released), released.accepted)

    def round(self) -> Outcome:
        """Do one more round and return what it made. A node that fails, is late or lies costs the round its update, and no more.

        Raises:
            BudgetSpent: the round's release would exceed the budget; no device was asked.
            WorkerError: without noise, and time and again too few users have answered.
            LinkError: the SuperLink does not answer, or has ended the run; nothing of the round was released.
            ConfigError: the roster cannot be read.
        """
        if self.account is not None:
            self.account.check()
        for _ in range(TRIES):
            nodes = self._wait_for_users()
            present = [user for enrolled in nodes.values() for user in enrolled.ids if user < self.method.sampler.population]
            plan = begin(self.method, self.state, self.layout, self._secret, self.run, self.account, present)
            collector, asked_bytes = self._collect(plan, nodes)
            users = collector.fold.users
            if self.method.private or users >= self._options.least_users:
                tally = {"downlink_bytes": asked_bytes, "unanswered_users": float(len(_users_of(plan)) - len(self._accepted))}
                return self._finish(plan, collector, tally)
            self.say(f"round {plan.spec.streams.round}: {users} users have answered, expected {self._options.least_users}; again")
            # Of what devices keep of the two tries only one can count: that of the attempt of which an update was taken.
            self.state = dataclasses.replace(self.state, attempt=self.state.attempt + 1)
        raise WorkerError(
            f"In {TRIES} tries no {self._options.least_users} users have answered within {self._options.deadline_seconds:g} s; wait "
            "for more nodes, or lower deployment.least_users or raise deployment.deadline_seconds."
        )

    def evaluate_units(self) -> list[Counts]:
        """Return what each held-out unit of the task here adds to the metrics of the current model, in their order."""
        if self._here is None:
            self._here = Site(self.task, Replica.of(self.task, self._device))
        return [counts for _, counts in evaluate_units(self._here, self.state.params, range(self.task.held_out_units))]

    @property
    def measure(self) -> Callable[[], dict[str, float]] | None:
        """Evaluates the current model on the devices and returns the metrics; None: `evaluate_units` is to be asked."""
        return self._measure if self._rates else None

    def _finish(self, plan: Plan, collector: Collector, seen: Mapping[str, float]) -> Outcome:
        keep, accepted = self.keep, self._accepted
        with_users = None if keep is None else lambda released: keep(dataclasses.replace(released, accepted=accepted))
        plan = dataclasses.replace(plan, downlink_bytes=int(seen["downlink_bytes"]))
        outcome = finish(self.method, self.state, self.layout, plan, [collector.partial()], self.account, with_users)
        return self._done(
            dataclasses.replace(outcome, tally=add_up([outcome.tally, {"unanswered_users": seen["unanswered_users"]}])), accepted
        )

    def _done(self, outcome: Outcome, accepted: Iterable[int]) -> Outcome:
        self.state = outcome.state
        self._taken |= dict.fromkeys(accepted, (outcome.state.round, outcome.attempt))
        return outcome

    def _wait_for_users(self) -> dict[int, Enrolled]:
        """Return the nodes that are there and may take part, once they have users enough."""
        said = False
        while True:
            nodes = self._there()
            users = sum(user < self.method.sampler.population for enrolled in nodes.values() for user in enrolled.ids)
            if users >= self._options.least_users:
                return nodes
            if not said:
                self.say(f"waiting for {self._options.least_users} users; {users} are there")
            said = True
            time.sleep(SECONDS_BETWEEN_LOOKS)

    def _there(self) -> dict[int, Enrolled]:
        """Return the nodes that may take part, one of each name, and count the others."""
        roster, found, names = Roster.read(self._options.roster), dict[int, Enrolled](), set[str]()
        for node, said in self._names_of() if self._options.insecure else self._keys_of():
            enrolled = roster.by_name(said) if self._options.insecure else roster.by_key(said)
            if enrolled is None:
                self._leave_out(str(node), "unregistered", said or "a node without a key or a name")
            elif enrolled.revoked:
                self._leave_out(enrolled.name, "revoked")
            elif enrolled.name in names:  # whose users would count twice
                self._leave_out(enrolled.name, "duplicate", f"node {node}")
            else:
                found[node] = enrolled
                names.add(enrolled.name)
        self._nodes = max(1, len(found))
        return found

    def _leave_out(self, node: str, cause: Cause, detail: str = "") -> None:
        """Count a node that is not asked, once a round: those that are there are looked at twice a second while users are waited for."""
        if self._left_out.get(node) != (self.state.round, cause):
            self._left_out[node] = (self.state.round, cause)
            self._reject(node, cause, detail)

    def _keys_of(self) -> Iterator[tuple[int, str]]:
        for info in self._link.nodes():
            try:
                yield info.node_id, public_line(info.public_key)
            except ConfigError:
                yield info.node_id, ""

    def _names_of(self) -> Iterator[tuple[int, str]]:
        """Return what nodes call themselves, the newest first: they are asked once, and taken at their word."""
        there = self._link.node_ids()
        new = {str(node): Asked(node, str(node), "", "") for node in there if node not in self._names}
        out = [(Message(RecordDict({"request": ConfigRecord()}), a.node, MessageType.QUERY), a) for a in new.values()]
        for asked, reply in self._asking.replies(self._asking.push(out), Gate("", 0, 0, "", 0)):
            self._names[asked.node] = _name_said(reply)
        return iter([(node, name) for node, name in reversed(self._names.items()) if node in there])

    def _collect(self, plan: Plan, nodes: Mapping[int, Enrolled]) -> tuple[Collector, float]:
        """Ask the users of a plan, and return the sum of what was taken of the answers, and the bytes that went down."""
        streams, spec = plan.spec.streams, plan.spec
        # As many bytes as this round's chain and codec can make of an update, and no more.
        largest = Wire.of(spec, self.method.client, self.layout).largest
        gate = Gate(self.run, streams.round, streams.attempt, spec.digest, largest, signed=not self._options.insecure)
        self._asking.count_late()
        out = self._asking.push(self._requests(plan, nodes))
        down = float(len(out) * (len(spec.params) + len(spec.support) + len(spec.control)))
        collector, self._accepted = Collector(spec.without_vectors(), self.layout), ()
        by_examples = self.method.weighting == "examples" and not self.method.private
        heaviest = (math.inf if self.method.max_examples is None else 1.0) if by_examples else None
        measured = self._options.diagnostics or not self.method.private
        read = partial(gate.updates, heaviest=heaviest, measured=measured)
        for asked, given in self._read(self._asking.replies(out, gate, self._enough), read):
            self._accepted += tuple(c.user for c in given if self._take(collector, c, asked) and c.payload is not None)
        return collector, down

    def _enough(self) -> bool:
        """Return whether no more answers are waited for. Under noise nobody's answer may keep another's out of the sum."""
        return not self.method.private and len(self._accepted) >= self.method.sampler.expected_cohort

    def _take(self, collector: Collector, contribution: Contribution, asked: Asked) -> bool:
        fault = collector.take(0, contribution)
        if fault is not None:
            self._reject(asked.name, "undecodable", f"user {contribution.user}: {fault}")
        return fault is None

    def _requests(self, plan: Plan, nodes: Mapping[int, Enrolled]) -> Iterator[tuple[Message, Asked]]:
        spec, cohort, few = plan.spec, {*_users_of(plan)}, self._options.users_per_message
        model = messages.model_record(spec.params, spec.control)
        for node, enrolled in nodes.items():
            users = [user for user in enrolled.ids if user in cohort]
            for start in range(0, len(users), few):
                asked = Asked(node, enrolled.name, enrolled.key, secrets.token_hex(16), tuple(users[start : start + few]))
                blocks, errand = [(0, asked.users)], self._errand(spec.streams, asked, enrolled)
                content = messages.train_request(spec, blocks, self._recipe, self._device, "updates", model, errand=errand)
                yield self._message(content, MessageType.TRAIN, asked, spec.streams.round), asked

    def _errand(self, streams: Streams, asked: Asked, enrolled: Enrolled) -> messages.Errand:
        taken = {user: self._taken[user] for user in asked.users if user in self._taken}
        told = (self.run, streams.round, streams.attempt, asked.nonce, enrolled.first, enrolled.users, taken)
        return messages.Errand(*told, private=self.method.private, diagnostics=self._options.diagnostics)

    @staticmethod
    def _message(content: RecordDict, kind: str, asked: Asked, round: int) -> Message:
        return Message(content, asked.node, kind, ttl=TIME_TO_LIVE, group_id=str(round))

    def _reject(self, node: str, cause: Cause, detail: str = "") -> None:
        self.rejected[cause] += 1
        if self.warn is not None:
            account, round = self.account, self.state.round + 1
            attempt = self.state.attempt if account is None else account.attempts(round)
            self.warn(Rejection(round, attempt, node, cause, detail[:MOST_CHARACTERS]))

    def _measure(self) -> dict[str, float]:
        """Evaluate on the devices. Under noise the mean of the nodes' own rates is released, with noise, and charged."""
        account, round = self.account, self.state.round
        try:
            if account is not None:
                account.check()
        except BudgetSpent as spent:
            self.say(f"not evaluated: {spent}")
            return {}
        streams = Streams(self._secret, self.run, round, 0 if account is None else account.evaluations(round))
        payload = DenseCodec().encode(Dense(self.state.params), self.layout)
        signed = not self._options.insecure
        gate = Gate(self.run, round, streams.attempt, digest_of(payload), 0, signed=signed, said=LARGEST_COUNTS)
        model, out = messages.model_record(payload), list[tuple[Message, Asked]]()
        for node, enrolled in self._wait_for_users().items():
            asked = Asked(node, enrolled.name, enrolled.key, secrets.token_hex(16))
            content = messages.evaluate_request([], self._recipe, self._device, model, self._errand(streams, asked, enrolled))
            out.append((self._message(content, MessageType.EVALUATE, asked, round), asked))
        answers = self._asking.replies(self._asking.push(out), gate)
        if not self.method.private:
            return pooled(self.task, self._read(answers, gate.counts), self._reject)
        mechanism = self.method.release.mechanism
        if account is None or mechanism is None:
            raise RuntimeError("Expected an account and a mechanism under noise.")
        return noised(self._rates, self._read(answers, gate.rates), mechanism.noise_multiplier, account, streams)

    def _read(self, answers: Iterable[tuple[Asked, Message]], read: Callable[[Message, Asked], Read]) -> Iterator[tuple[Asked, Read]]:
        """Yield what passes the gate of some answers, and count what does not."""
        for asked, reply in answers:
            try:
                passed = read(reply, asked)
            except Rejected as rejected:
                self._reject(asked.name, rejected.cause, str(rejected))
                continue
            yield asked, passed


def _name_said(reply: Message) -> str:
    """Return the name of a node by its own account; empty where its reply has none."""
    said = None if reply.has_error() else reply.content.config_records.get("reply")
    name = "" if said is None else said.get("name")
    return name if isinstance(name, str) and NAME.fullmatch(name) else ""


def _users_of(plan: Plan) -> list[int]:
    return [user for _, users in plan.blocks for user in users]
