"""The central baseline: the same task, users and batches as a federated run, every batch one step of one optimizer."""

import logging
from collections.abc import Callable

from experiments.engines import secret_of
from experiments.prepare import Prepared
from fedclip.config import CentralOptions
from fedclip.inplace import InPlace, clip_factor
from fedclip.layout import Layout
from fedclip.method import ServerState
from fedclip.process import flushed
from fedclip.replica import Replica
from fedclip.rng import Streams
from fedclip.round import Outcome, Released
from fedclip.schedules import Schedule
from fedclip.site import Site, evaluate_units
from fedclip.tally import Tally, add_up
from fedclip.tasks.base import Counts
from strategies.naming import run_digest

log = logging.getLogger(__name__)


class Central:
    """Central training as an engine: a round draws the cohort of the federated run, and takes each step of each user with one optimizer.

    Nothing is clipped but gradients, nothing is noised, and no bytes are sent.
    """

    command = "train-central"
    account = None
    keep: Callable[[Released], None] | None = None
    workers = 1

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, experiment = prepared, prepared.experiment
        self._site = Site(prepared.task, Replica.of(prepared.task, experiment.run.device))
        self._optimizer = _optimizer(self._site.replica, experiment.central)
        self._rounds = 0

    @property
    def state(self) -> ServerState:
        """The parameters after the last round, and the optimizer's state."""
        return ServerState(self._site.replica.values().cpu(), self._optimizer.state, self._rounds)

    @property
    def layout(self) -> Layout:
        """The layout of the model."""
        return self._site.replica.layout

    def round(self) -> Outcome:
        """Train on one cohort, and return what was measured of it; a user whose data or training raises is left out, and counted."""
        prepared, replica = self._prepared, self._site.replica
        streams = Streams(secret_of(prepared), run_digest(prepared.experiment), self._rounds + 1)
        replica.restart()  # as after a restart: batch statistics are not in a checkpoint
        replica.model.train()
        tallies, errors = list[Tally](), list[str]()
        for user in prepared.method.sampler.draw(streams.generator("cohort")):
            try:
                tallies.append(self._user(user, streams))
            except Exception as error:  # user data and tasks may raise anything; it is counted and reported
                log.debug("user %d failed", user, exc_info=True)
                tallies.append({"failed_users": 1.0})
                errors.append(f"user {user}: {type(error).__name__}: {error}")
        self._rounds += 1
        return Outcome(self.state, add_up(tallies), tuple(errors))

    def replay(self, released: Released) -> Outcome:
        """Nothing is released here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Central training releases nothing that could be replayed.")

    def restore(self, state: ServerState) -> None:
        """Go on from another state."""
        self._site.replica.load(state.params)
        self._optimizer.state, self._rounds = state.server, state.round

    def evaluate_units(self) -> list[Counts]:
        """Return what each held-out unit adds to the metrics of the current model, in their order."""
        units = range(self._prepared.task.held_out_units)
        return [c for _, c in evaluate_units(self._site, self._site.replica.values(), units)]

    def _user(self, user: int, streams: Streams) -> Tally:
        replica, task, local = self._site.replica, self._site.task, self._prepared.method.local
        lr, losses = Schedule.of(self._prepared.experiment.central.lr)(streams.round), list[float]()
        with flushed(), streams.torch_seeded("training", user, self._prepared.experiment.run.device):
            examples = task.load_user(user, streams.generator("data", user))
            for of_step, finite in local.gradients(replica, task, examples, streams.generator("batches", user)):
                losses += [float(loss) for loss in of_step]
                if finite:
                    replica.grads.mul_(clip_factor(replica.grads, local.clip_norm))
                    self._optimizer.step(lr)
        return {"users": 1.0, "train_loss": sum(losses) / len(losses), "losses": 1.0} if losses else {"users_without_data": 1.0}


def _optimizer(replica: Replica, options: CentralOptions) -> InPlace:
    """Return the optimizer; Adam is AdamW without decay."""
    return InPlace(replica, "adamw" if options.optimizer == "adam" else options.optimizer, weight_decay=options.weight_decay)
