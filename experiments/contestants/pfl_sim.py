"""Apple's pfl-research on the same work, with its central Gaussian mechanism, in one process or several.

Runs in any interpreter that has pfl, PyTorch and NumPy.
"""

import os

from experiments.contestants.turns import Turns, arguments, start_ranks

if __name__ == "__main__":
    args = arguments()
    if args.workers > 1 and "RANK" not in os.environ:
        start_ranks(args.workers, __spec__.name)
    turns = Turns()

import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism

from experiments.contestants import workload

NOISE_SCALE = 1.0


class Net(torch.nn.Module):
    """A model with the two methods that pfl asks for."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> torch.Tensor:
        """Return the mean cross-entropy."""
        return F.cross_entropy(self.model(x), y)

    def metrics(self, x: torch.Tensor, y: torch.Tensor, eval: bool = False) -> dict[str, Any]:
        """Return the loss."""
        return {"loss": Weighted(self.loss(x, y).item() * len(y), len(y))}


class TakesTurns(TrainingProcessCallback):  # type: ignore[misc]  # pfl is not there where types are checked
    """Waits before each central iteration until a round is asked for, and says how long it took."""

    def __init__(self, cohort: int, parameters: int) -> None:
        self._cohort, self._parameters, self._begin = cohort, parameters, 0.0
        self._first = int(os.environ.get("RANK", "0")) == 0
        self._device = next(net.parameters()).device

    def on_train_begin(self, *, model: Any) -> Any:
        """Wait for the first round."""
        if self._first:
            turns.ready(self._parameters, torch.__version__)
        self._await_turn()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
        """Say what the round took, and wait for the next."""
        if self._first:
            turns.say({"seconds": time.perf_counter() - self._begin, "users": self._cohort})
        return not self._await_turn(), Metrics()

    def on_train_end(self, *, model: Any) -> None:
        """Do nothing."""

    def _await_turn(self) -> bool:
        """Return whether a round was asked for: the first process hears it, and tells the others."""
        asked = torch.tensor(int(turns.asked()) if self._first else 0, device=self._device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(asked, 0)
        self._begin = time.perf_counter()
        return bool(asked)


def main() -> None:
    """Do rounds as they are asked for."""
    torch.set_num_threads(1)
    np.random.seed(0)  # noqa: NPY002  pfl draws from the global generator
    torch.manual_seed(0)
    sampler = get_user_sampler("minimize_reuse", list(range(args.population)))
    data = FederatedDataset(lambda user: PyTorchTensorDataset(workload.user_data(user), user_id=user), sampler)
    algorithm = NNAlgorithmParams(
        central_num_iterations=10**9, evaluation_frequency=10**9, train_cohort_size=args.cohort, val_cohort_size=0
    )
    privacy = CentrallyAppliedPrivacyMechanism(GaussianMechanism(workload.CLIP, NOISE_SCALE))
    model = PyTorchModel(net, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(net.parameters(), 1.0))
    FederatedAveraging().run(
        algorithm_params=algorithm,
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[privacy]),
        model=model,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=workload.LR, local_batch_size=workload.BATCH),
        model_eval_params=NNEvalHyperParams(local_batch_size=workload.SAMPLES),
        callbacks=[TakesTurns(args.cohort, sum(p.numel() for p in net.parameters()))],
        send_metrics_to_platform=False,
    )


if __name__ == "__main__":
    net = Net(workload.make_model(args.model))
    main()
