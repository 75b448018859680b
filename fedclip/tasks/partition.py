"""`deal`: the examples of any data set to users, by flwr-datasets' partitioners. The library is imported when it is needed."""

import contextlib
import hashlib
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from fedclip.options import ConfigError, Options
from fedclip.tasks import partition_options as options_of

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

    from fedclip.tasks.partition_options import PartitionOptions

COLUMN = "label"


def deal(options: "PartitionOptions", labels: np.ndarray, users: int | None, seed: int, ids: np.ndarray | None = None) -> list[np.ndarray]:
    """Return for each user the positions of its examples, int64, ascending.

    Guarantees:
        A function of the arguments: the same in every process. No position is dealt twice; a partition may leave some out.

    Args:
        options: the partition.
        labels: of the examples, shape (n,): what partitions by label look at.
        users: how many users there are to be; None: as many as the ids give.
        seed: seed of the order of the examples and of all that the partition draws.
        ids: who made each example, shape (n,); None where nobody says.

    Raises:
        ConfigError: the extra is not installed, natural ids of a data set that has none, or a partition that cannot be made.
    """
    natural = isinstance(options, options_of.NaturalId | options_of.GroupedNaturalId)
    if natural and ids is None:
        raise ConfigError(f"task.partition.name: '{options.name}' needs data that says who made each example; take another partition.")
    sizes = getattr(options, "partition_sizes", None)
    if sizes is not None and len(sizes) != users:
        raise ConfigError(f"task.partition.partition_sizes: expected one size a user, {users} of them, got {len(sizes)}.")
    if not natural and users is None:
        raise ConfigError("population.size: missing; say how many users share the examples, 100 for example.")
    # Partitions by size take what lies together, so that the order must not be that of a file.
    order = _stream(seed).permutation(len(labels))
    column = np.unique(ids if natural and ids is not None else labels, return_inverse=True)[1][order]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # of attempts and of progress
            warnings.simplefilter("ignore")
            parts = _parts(_partitioner(options, users or 1, seed), column)
    except ImportError as error:
        raise ConfigError(
            f"task.partition needs the package {error.name}; install the extra: pip install 'fedclip[partitions]'."
        ) from error
    except Exception as error:
        raise ConfigError(
            f"task.partition: {options.name} cannot deal {len(labels)} examples to {users} users: {error} "
            f"Change {_changeable(options)}population.size (num_partitions)."
        ) from error
    if users is not None and len(parts) != users:
        raise ConfigError(f"population.size: expected {len(parts)}, the users that task.partition gives, got {users}.")
    return [np.sort(order[part]) for part in parts]


def _parts(partitioner: "Partitioner", column: np.ndarray) -> list[np.ndarray]:
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"place": np.arange(len(column)), COLUMN: column})
    count = partitioner.num_partitions
    return [np.asarray(partitioner.load_partition(n).with_format("numpy")["place"][:], dtype=np.int64) for n in range(count)]


def _partitioner(options: "PartitionOptions", users: int, seed: int) -> "Partitioner":
    from flwr_datasets import partitioner as library

    given = {key: list(value) if isinstance(value, tuple) else value for key, value in options.model_dump(exclude={"name"}).items()}
    # The order within a user is not the partition's: batches are shuffled.
    drawn = {"partition_by": COLUMN, "shuffle": False, "seed": seed}
    match options:
        case options_of.Iid():
            return library.IidPartitioner(users)
        case options_of.Dirichlet():
            return library.DirichletPartitioner(users, **drawn, **given)
        case options_of.InnerDirichlet():
            return library.InnerDirichletPartitioner(**drawn, **given)
        case options_of.Pathological():
            return library.PathologicalPartitioner(users, **drawn, **given)
        case options_of.Shards():
            return library.ShardPartitioner(users, **drawn, **given)
        case options_of.Sizes():
            return library.SizePartitioner(**given)
        case options_of.Linear():
            return library.LinearPartitioner(users)
        case options_of.Square():
            return library.SquarePartitioner(users)
        case options_of.Exponential():
            return library.ExponentialPartitioner(users)
        case options_of.Distribution():
            array = np.asarray(given.pop("distribution_array"))
            return library.DistributionPartitioner(array, users, **drawn, **given)
        case options_of.NaturalId():
            return library.NaturalIdPartitioner(COLUMN)
        case options_of.GroupedNaturalId():
            return library.GroupedNaturalIdPartitioner(COLUMN, **given)


def _changeable(options: Options) -> str:
    names = [name for name in type(options).model_fields if name != "name"]
    return f"{', '.join(f'task.partition.{name}' for name in names)} or " if names else ""


def _stream(seed: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"partition/{seed}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
