"""`Federated`: the one Flower strategy. It runs any `Method`; what a method does is in its stages, never here."""

import dataclasses
from collections.abc import Callable, Iterable
from logging import INFO
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from clients import messages
from fedclip.account import Account
from fedclip.client import Collector, Partial
from fedclip.codec import DenseCodec
from fedclip.layout import Layout
from fedclip.method import Method, ServerState
from fedclip.process import settle_process
from fedclip.round import Outcome, Plan, Released, WorkerError, begin, deal, finish, replay
from fedclip.simulation import initial_params
from fedclip.tasks.base import Counts, Task
from fedclip.tasks.build import TaskRecipe
from fedclip.update import Dense


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
        states: the folder, shared by all workers, of what the client chain keeps of users.

    Raises:
        ValueError: the client chain keeps states of users, and there is no folder for them.

    Attributes:
        state: the state after the last round.
        outcome: what the last round made, None before the first.
        keep: makes what was released durable before the server step; None: nothing does.
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
        states: Path | None = None,
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
        self._states = str(states.absolute()) if method.stateful and states is not None else ""
        self._plan: Plan | None = None
        self._sent = 0

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
        self._plan = begin(self.method, self.state, self.layout, self._secret, self._run, self.account)
        nodes, spec = list(grid.get_node_ids()), self._plan.spec
        shares = deal(self._plan.blocks, len(nodes), self.task)
        model = messages.model_record(spec.params, spec.control)
        contents = [
            messages.train_request(spec, share, self._recipe, self._device, self._reply, model, self._states) for share in shares if share
        ]
        return self._address(contents, nodes, MessageType.TRAIN, server_round, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Add the sums, release, take the server step; return the new model and the mean training loss.

        Raises:
            WorkerError: a node replied with an error, or not at all.
        """
        if self._plan is None:
            raise RuntimeError("Expected configure_train before aggregate_train.")
        partials = self._partials(self._checked(replies), self._plan)
        self.outcome = finish(self.method, self.state, self.layout, self._plan, partials, self.account, self.keep)
        self.state, self._plan = self.outcome.state, None
        losses = self.outcome.tally.get("losses", 0.0)
        loss = self.outcome.tally.get("train_loss", 0.0)
        mean = loss / losses if isinstance(loss, float) and isinstance(losses, float) and losses else float("nan")
        return self.arrays(), MetricRecord({"train_loss": mean})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Return a message for each node with held-out units to evaluate."""
        nodes = list(grid.get_node_ids())
        shares = [range(self.task.held_out_units)[i :: len(nodes)] for i in range(len(nodes))]
        contents = [messages.evaluate_request(s, self._recipe, self._device, arrays) for s in shares if len(s)]
        return self._address(contents, nodes, MessageType.EVALUATE, server_round, grid)

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

    def round(self, grid: Grid) -> Outcome:
        """Do one more round on the nodes of a grid and return what it made."""
        number = self.state.round + 1
        self.aggregate_train(number, grid.send_and_receive(self.configure_train(number, self.arrays(), ConfigRecord(), grid)))
        if self.outcome is None:
            raise RuntimeError("Expected an outcome after aggregate_train.")
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
        messages_out = self.configure_evaluate(self.state.round, self.arrays(), ConfigRecord(), grid)
        return self._counts(grid.send_and_receive(messages_out))

    def _counts(self, replies: Iterable[Message]) -> list[Counts]:
        counts = dict(pair for reply in self._checked(replies) for pair in messages.read_evaluate_reply(reply.content))
        return [counts[unit] for unit in sorted(counts)]

    def _address(self, contents: list[RecordDict], nodes: list[int], kind: str, server_round: int, grid: Grid) -> list[Message]:
        self._sent = len(contents)
        pairs = zip(contents, nodes, strict=False)  # fewer contents than nodes where some have nothing to do
        return [grid.create_message(content, kind, node, str(server_round)) for content, node in pairs]

    def _checked(self, replies: Iterable[Message]) -> list[Message]:
        arrived = list(replies)
        failed = [r for r in arrived if r.has_error()]
        if failed:
            reason = (failed[0].error.reason or "no reason given").strip().splitlines()[-1]
            raise WorkerError(f"Node {failed[0].metadata.src_node_id} failed: {reason}")
        if len(arrived) != self._sent:
            raise WorkerError(f"Expected {self._sent} replies, got {len(arrived)}; a node is gone or did not answer in time.")
        return arrived

    def _partials(self, replies: list[Message], plan: Plan) -> list[Partial]:
        if self._reply == "sums":
            return [messages.read_sums_reply(r.content) for r in replies]
        collector = Collector(plan.spec, self.layout)
        for reply in replies:
            for block, contribution in messages.read_updates_reply(reply.content):
                collector.take(block, contribution)
        return [collector.partial()]
