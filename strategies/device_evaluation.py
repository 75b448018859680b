"""What becomes of real devices' own evaluations: counts are pooled, and under noise the nodes' rates are released with it."""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from clients.gate import Asked, Cause
from fedclip.account import Account
from fedclip.rng import Streams
from fedclip.tasks.base import Counts, Task

MOST_NAMES = 1000
"""Different names of counts in all replies together: a task has some for each language. Where there are more, whoever names most goes."""

Reject = Callable[[str, Cause, str], None]
"""Is told of a reply that is not taken: the name of its node, the cause, and what is said of it."""


def pooled(task: Task, answers: Iterable[tuple[Asked, Sequence[Counts]]], reject: Reject) -> dict[str, float]:
    """Return the metrics of a task over all that the units of nodes counted; nothing where there is none.

    They are made once, of everything. Where that cannot be done, a reply that they cannot be made of is found by halving, and left out.
    """
    taken = list(answers)
    names = [{name for unit in counts for name in unit} for _, counts in taken]
    while len(set[str]().union(*names)) > MOST_NAMES:
        most = max(range(len(taken)), key=lambda n: (len(names[n]), n))
        reject(taken.pop(most)[0].name, "malformed", f"{len(names.pop(most))} names of counts, and over {MOST_NAMES} with those of others")

    def summary(many: int) -> dict[str, float] | Exception:
        counts = [unit for _, units in taken[:many] for unit in units]
        try:
            return task.summarise(counts, 0) if counts else {}
        except Exception as error:  # noqa: BLE001  at what devices send a task may raise anything
            return error

    while isinstance(found := summary(len(taken)), Exception):
        good, bad = 0, len(taken)  # of the first `good` metrics can be made, of the first `bad` they cannot
        while bad - good > 1:
            middle = (good + bad) // 2
            wrong = summary(middle)
            good, bad, found = (good, middle, wrong) if isinstance(wrong, Exception) else (middle, bad, found)
        asked, _ = taken.pop(bad - 1)
        reject(asked.name, "malformed", f"no counts of this task: {type(found).__name__}: {found}")
    return found


def noised(
    names: tuple[str, ...], answers: Iterable[tuple[Asked, dict[str, float]]], multiplier: float, account: Account, streams: Streams
) -> dict[str, float]:
    """Release the number of nodes and the sums of their rates with noise, and return the means.

    A node adds 1 to the number and at most 1 to each sum, however many users it has: its vector of K rates and a one has a norm of
    at most sqrt(1 + K). The interval is that of the noise alone.

    Args:
        names: of the K rates, each between 0 and 1.
        answers: of nodes; one without rates holds nothing out, and counts as if it had not answered.
        multiplier: noise multiplier z.
        account: what the release is charged to, before the noise is drawn.
        streams: of the round, the attempt being that of the evaluation.
    """
    total, columns = [0.0] * (1 + len(names)), (None, *names)
    for _, rates in answers:
        if rates:
            total = [so_far + (1.0 if name is None else rates.get(name, 0.0)) for so_far, name in zip(total, columns, strict=True)]
    bound = math.sqrt(len(total))
    deviation = multiplier * bound
    account.charge(streams.run, streams.round, streams.attempt, multiplier, bound, "evaluation")
    nodes, *sums = (np.asarray(total) + deviation * streams.generator("evaluation").standard_normal(len(total))).tolist()
    count, measured = max(1.0, nodes), dict[str, float]()
    for name, sum_ in zip(names, sums, strict=True):
        rate, width = sum_ / count, 1.96 * deviation / count
        bounds = {"": rate, "_low": rate - width, "_high": rate + width}
        measured |= {f"{name}{end}": min(1.0, max(0.0, value)) for end, value in bounds.items()}
    return measured
