"""`Federated`: the one Flower strategy. It runs any `Method`; what a method does is in its stages, never here."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from logging import INFO
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clients import messages
from clients.states import LENT
from fedclip.account import Account
from fedclip.codec import DenseCodec
from fedclip.collector import Collector, Partial
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.pace import Pace
from fedclip.process import settle_process
from fedclip.round import Outcome, Plan, Released, WorkerError, begin, cost_of, deal, finish, foresee, replay
from fedclip.simulation import initial_params
from fedclip.site import WORTH_A_THREAD
from fedclip.spec import Block
from fedclip.tally import Tally, add_up, number
from fedclip.tasks.base import Counts, Task
from fedclip.tasks.build import TaskRecipe
from fedclip.update import Dense

SECONDS_BETWEEN_PULLS = 0.2


@dataclass(frozen=True)
class Dealt:
    """The blocks of a round, the nodes that there were and where, and what each of them is to train: those with nothing are left out."""

    blocks: tuple[Block, ...]
    nodes: list[int]
    machines: list[str]
    shares: dict[int, list[Block]]


class Federated(Strategy):
    """Rounds of a method on the nodes of a Flower grid: one message a node, with the ids of the users that it trains.

    Flower's own `start` works on it, from round 1; `round` and `evaluate` are for loops of one's own, which may begin anywhere.

    Args:
        method: the method.
        task: the task, for its model, its held-out units and the predicted costs of users; nothing is trained here.
        recipe: how every node builds the same task.
        secret: the master secret of the random streams.
        run: the name of the run in the random streams; never Flower's run id, which changes at a restart.
        device: where nodes train.
        reply: `"sums"` or `"updates"`.
        account: what the releases are charged to; None keeps no account.
        states: the folder, shared by all workers, of what the client chain keeps of users; or a place that `clients.states` lends.

    Raises:
        ValueError: the client chain keeps states of users, and there is no folder for them.

    Attributes:
        state: the state after the last round.
        outcome: what the last round made, None before the first.
        keep: makes what was released durable before the server step; None: nothing does.
        watch: is told of each node that is done with its part of a round, its users and their seconds; None: nobody is.
    """

    def __init__(
        self,
        method: Method,
        task: Task,
        recipe: TaskRecipe,
        secret: str,
        run: str,
        *,
        device: str = "cpu",
        reply: str = "sums",
        account: Account | None = None,
        states: Path | str | None = None,
    ) -> None:
        settle_process()
        self.method, self.task = method, task
        self.layout = Layout.of(self.task.make_model())
        self.state = ServerState.initial(initial_params(self.task), method, self.layout)
        self.outcome: Outcome | None = None
        self._recipe, self._secret, self._run, self._device, self._reply = recipe.to_json(), secret, run, device, reply
        if method.stateful and states is None:
            raise ValueError(f"{method.keeper} keeps a state for each user; give a folder for them.")
        self.account = account
        self.keep: Callable[[Released], None] | None = None
        self._states = str(states.absolute() if isinstance(states, Path) else states) if method.stateful else ""
        self.watch: Callable[[int, int, float], None] | None = None
        self._plan: Plan | None = None
        self._sent = dict[str, int]()  # by type of message
        self._dealt: dict[int, list[Block]] = {}
        self._foreseen: Dealt | None = None
        self._reads = False  # whether reading users' data takes time
        self._pace = Pace()

    def arrays(self) -> ArrayRecord:
        """Return the current model as Flower's `start` wants it."""
        return messages.model_record(DenseCodec().encode(Dense(self.state.params), self.layout))

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Draw the cohort and return a message for each node that has users to train.

        Raises:
            ValueError: `server_round` is not the round after the last one.
        """
        if server_round != self.state.round + 1:
            raise ValueError(
                f"Expected round {self.state.round + 1}, got {server_round}; a strategy goes on from its own state, so make a new one."
            )
        params = DenseCodec().decode(messages.model_bytes(arrays), self.layout).vector
        self.state = dataclasses.replace(self.state, params=params)
        return self._requests(grid)

    def _requests(self, grid: Grid) -> list[Message]:
        """Draw the cohort and return a message for each node that has users to train."""
        self._plan = begin(self.method, self.state, self.layout, self._secret, self._run, self.account)
        nodes, spec = list(grid.get_node_ids()), self._plan.spec
        pinned = bool(getattr(grid, "pinned", True))
        machines = grid.machines(nodes) if pinned and self._states.startswith(f"{LENT}:") and hasattr(grid, "machines") else []
        foreseen, self._foreseen = self._foreseen, None
        if foreseen is None or (foreseen.blocks, foreseen.nodes, foreseen.machines) != (self._plan.blocks, nodes, machines):
            foreseen = self._deal(self._plan.blocks, nodes, machines, pinned)
        self._dealt = foreseen.shares
        if self._reads and getattr(grid, "pinned", False):  # who does a node's messages will do the next one too
            self._foreseen = self._deal(foresee(self.method, self._secret, self._run, spec.streams.round + 1), nodes, machines, pinned)
        ahead = self._foreseen.shares if self._foreseen else {}
        model = messages.model_record(spec.params, spec.control)
        contents = {
            node: messages.train_request(
                spec, share, self._recipe, self._device, self._reply, model, self._states, ahead=_first(ahead.get(node, ()))
            )
            for node, share in self._dealt.items()
        }
        return self._address(contents, MessageType.TRAIN, self.state.round + 1, grid)

    def _deal(self, blocks: tuple[Block, ...], nodes: list[int], machines: list[str], pinned: bool) -> "Dealt":
        # Where any worker does any node's messages, what one did says nothing of the next time.
        speeds = self._pace.of(nodes) if pinned else None
        shares = deal(blocks, len(nodes), self.task, speeds, machines if len(set(machines)) > 1 else None)
        # The cheapest block, which was dealt last, goes first: training waits for the data of its first user.
        return Dealt(blocks, nodes, machines, {n: [share[-1], *share[:-1]] for n, share in zip(nodes, shares, strict=True) if share})

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the sums, release, take the server step; return the new model and the mean training loss.

        Raises:
            WorkerError: a node replied with an error, or not at all.
        """
        tally = self._finished(replies).tally
        losses, loss = tally.get("losses", 0.0), tally.get("train_loss", 0.0)
        mean = loss / losses if isinstance(loss, float) and isinstance(losses, float) and losses else float("nan")
        return self.arrays(), MetricRecord({"train_loss": mean})

    def _finished(self, replies: Iterable[Message]) -> Outcome:
        """Add the sums, release, and take the server step."""
        if self._plan is None:
            raise RuntimeError("Expected configure_train before aggregate_train.")
        partials = self._partials(replies, self._plan)
        self.outcome = finish(self.method, self.state, self.layout, self._plan, partials, self.account, self.keep)
        self.state, self._plan = self.outcome.state, None
        return self.outcome

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """Return a message for each node with held-out units to evaluate."""
        nodes = list(grid.get_node_ids())
        shares = {node: range(self.task.held_out_units)[i :: len(nodes)] for i, node in enumerate(nodes)}
        contents = {n: messages.evaluate_request(s, self._recipe, self._device, arrays) for n, s in shares.items() if len(s)}
        return self._address(contents, MessageType.EVALUATE, server_round, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the metrics over all the held-out units.

        Raises:
            WorkerError: a node replied with an error, or not at all.
        """
        return MetricRecord(dict(self.task.summarise(self._counts(replies), 0)))

    def summary(self) -> None:
        """Log what is run."""
        log(INFO, "\t├──> Method: %s", self.method)
        log(INFO, "\t└──> Model: %d parameters in %d tensors", self.layout.size, len(self.layout.names))

    def round(self, grid: Grid, evaluated: Callable[[list[Counts]], None] | None = None) -> Outcome:
        """Do one more round on the nodes of a grid and return what it made.

        Replies are added as they come, in any order, and each is let go before the next: memory does not grow with the number of nodes.

        Args:
            grid: the nodes.
            evaluated: is given what `evaluate_units` would return before the round: nodes evaluate first, and go on to training without
                waiting for each other or for it. It is called before anything is taken of the training, also where that cannot begin.
                None: nothing is evaluated.

        Raises:
            WorkerError: a node replied with an error, or not at all.
        """
        counted = self._evaluation(grid) if evaluated is not None else iter(())
        try:
            out = self._requests(grid)
            sizes = [(message.metadata, len(self._dealt[message.metadata.dst_node_id])) for message in out]  # ids come when they are sent
            replies = exchange(grid, out)
        except Exception:  # not on Ctrl-C, when nothing more is waited for
            if evaluated is not None:
                evaluated(self._counts(counted))
            raise
        if evaluated is not None:
            evaluated(self._counts(counted))
        outcome = self._finished(replies)
        faults = faults_of(grid, {meta.message_id: blocks for meta, blocks in sizes})
        self.outcome = dataclasses.replace(outcome, tally=outcome.tally | faults)
        return self.outcome

    def replay(self, released: Released) -> Outcome:
        """Take the server step of a round that was released before."""
        self.outcome = replay(self.method, self.state, self.layout, self._secret, self._run, released)
        self.state = self.outcome.state
        return self.outcome

    def evaluate_units(self, grid: Grid) -> list[Counts]:
        """Return what each held-out unit adds to the metrics of the current model, in their order.

        Raises:
            WorkerError: a node replied with an error, or not at all.
        """
        return self._counts(self._evaluation(grid))

    def _evaluation(self, grid: Grid) -> Iterator[Message]:
        return exchange(grid, self.configure_evaluate(self.state.round, self.arrays(), ConfigRecord(), grid))

    def _counts(self, replies: Iterable[Message]) -> list[Counts]:
        checked = self._checked(MessageType.EVALUATE, replies)
        counts = dict(pair for reply in checked for pair in messages.read_evaluate_reply(reply.content))
        return [counts[unit] for unit in sorted(counts)]

    def _address(self, contents: dict[int, RecordDict], kind: str, server_round: int, grid: Grid) -> list[Message]:
        self._sent[kind] = len(contents)
        return [grid.create_message(content, kind, node, str(server_round)) for node, content in contents.items()]

    def _checked(self, kind: str, replies: Iterable[Message]) -> Iterator[Message]:
        arrived = 0
        for reply in replies:
            if reply.has_error():
                reason = (reply.error.reason or "no reason given").strip().splitlines()[-1]
                raise WorkerError(f"Node {reply.metadata.src_node_id} failed: {reason}")
            arrived += 1
            yield reply
            del reply  # before the next comes
        if arrived != self._sent[kind]:
            raise WorkerError(f"Expected {self._sent[kind]} replies, got {arrived}; a node is gone or did not answer in time.")

    def _partials(self, replies: Iterable[Message], plan: Plan) -> Iterator[Partial]:
        if self._reply == "sums":
            yield from map(self._sum, self._checked(MessageType.TRAIN, replies))
            return
        collector = Collector(plan.spec, self.layout)
        for reply in self._checked(MessageType.TRAIN, replies):
            contributions = messages.read_updates_reply(reply.content)
            for block, contribution in contributions:
                collector.take(block, contribution)
            self._learn(reply.metadata.src_node_id, [contribution.tally for _, contribution in contributions])
        yield collector.partial()

    def _sum(self, reply: Message) -> Partial:
        partial = messages.read_sums_reply(reply.content)
        self._learn(reply.metadata.src_node_id, partial.tallies.values())
        return partial

    def _learn(self, node: int, tallies: Iterable[Tally]) -> None:
        """Take in what a node did, for the next round's shares and for whoever watches."""
        done = add_up({key: value for key, value in tally.items() if key in MEASURED} for tally in tallies)
        seconds = sum(number(done, key) for key in SECONDS)
        self._reads |= number(done, "read_seconds") > WORTH_A_THREAD * max(1.0, number(done, "users"))
        tried = number(done, "users") + number(done, "failed_users")  # of those that failed there are no seconds
        share = number(done, "users") / tried if tried > 0 else 1.0
        self._pace.learn(node, share * sum(cost_of(self._dealt.get(node, []), self.task).values()), seconds)
        if self.watch is not None:
            self.watch(node, int(number(done, "users")), seconds)


SECONDS = ("load_seconds", "train_seconds", "chain_seconds")
"""What a worker's time goes to."""

MEASURED = ("users", "failed_users", "read_seconds", *SECONDS)
"""Of what nodes measure, what they are known by."""


AHEAD = 4
"""So many users of its next share a worker reads at most while it waits for the next round: their data lie in its memory."""


def _first(share: Sequence[Block]) -> list[int]:
    """Return the first users of a share, in the order in which they are trained."""
    return list(islice((user for _, users in share for user in users), AHEAD))


def exchange(grid: Grid, out: list[Message]) -> Iterator[Message]:
    """Send messages and return an iterator over the replies, which yields them as they come, without holding any."""
    replies: Iterator[Message] = grid.stream(out) if hasattr(grid, "stream") else _pulled(grid, set(grid.push_messages(out)))
    return replies


def _pulled(grid: Grid, waiting: set[str]) -> Iterator[Message]:
    while waiting:
        arrived = list(grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
        if waiting and not arrived:
            time.sleep(SECONDS_BETWEEN_PULLS)
        while arrived:
            yield arrived.pop()


def faults_of(grid: Grid, blocks: dict[str, int]) -> Tally:
    """Return what a grid that replaces workers did since the last time: workers replaced, blocks done again; each where there were any."""
    if not hasattr(grid, "take_faults"):
        return {}
    replaced, redone = grid.take_faults()
    counts = {"workers_replaced": replaced, "blocks_redone": sum(blocks.get(message_id, 0) for message_id in redone)}
    return {name: float(count) for name, count in counts.items() if count}
