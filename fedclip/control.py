"""Control variates (SCAFFOLD, arXiv 1910.06378, option II), from what users send anyway: nothing more goes up, nothing more is clipped.

A user adds `c - c_i` to each of its K local gradients, and then has `c_i+ = c_i - c + delta_i / (K lr)`, delta_i being what it moved.
What the paper has it send beside delta_i, `c_i+ - c_i = delta_i / (K lr) - c`, follows from delta_i and from what everyone knows. So the
server takes `c <- c + |S|/N (mean delta_i / (K lr) - c)`, from the released mean: post-processing, as in DP-SCAFFOLD (2111.09278), without
a part of the bound or of the noise for a second vector.

Where a clip or a lossy stage lets through less than delta_i, both sides go by what was sent, so that c stays the mean of all c_i.
"""

import torch

from fedclip.layout import Layout
from fedclip.local import LocalSGD
from fedclip.transform import Chain, State


def check_local(local: LocalSGD) -> None:
    """Refuse local training whose steps are not the sum that `delta_i / (K lr)` takes them for.

    Raises:
        ValueError: another optimizer than plain SGD, or a number of steps that depends on the user's data.
    """
    if local.has_momentum or local.optimizer != "sgd":
        raise ValueError(
            f"Control variates need plain SGD at users, got {local.optimizer} with momentum {local.momentum}; set local.optimizer = 'sgd' "
            "and local.momentum = 0."
        )
    if local.precision == "float16":
        raise ValueError(
            "Control variates need every local step, and float16 leaves out those that overflow; set local.precision = 'bfloat16'."
        )
    if local.steps is None:
        raise ValueError(
            f"Control variates need the same number of local steps for all users, got epochs = {local.epochs}; give local.steps."
        )


def gradients_moved(local: LocalSGD) -> float:
    """Return K lr: what a user moves over the mean of its gradients."""
    return local.lr * (local.steps or 0)


def fresh_state(chain: Chain, layout: Layout, control: bool) -> State:
    """Return what is kept of a user that was never seen: the state of the chain and, with control variates, beside it c_i = 0."""
    return (chain.init(layout), torch.zeros(layout.size)) if control else chain.init(layout)


def next_of_user(own: torch.Tensor, control: torch.Tensor, sent: torch.Tensor, moved: float) -> torch.Tensor:
    """Return a user's next c_i: `c_i - c + sent / (K lr)`; all of shape (d,), `moved` as of `gradients_moved`."""
    return own - control + sent / moved


def next_of_server(control: torch.Tensor, mean: torch.Tensor, share: float, moved: float) -> torch.Tensor:
    """Return the server's next c: `c + share (mean / (K lr) - c)`.

    Args:
        control: c, shape (d,).
        mean: released, shape (d,).
        share: what the mean was divided by, over the population: |S| / N.
        moved: as of `gradients_moved`.
    """
    return control + share * (mean / moved - control)
