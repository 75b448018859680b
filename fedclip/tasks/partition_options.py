"""`[task.partition]`: how the examples of a data set become those of users, by flwr-datasets' partitioners. Imports no PyTorch.

Each section has the arguments of the partitioner that it names, but for the number of partitions (the population), the label (of the
data set) and the seed (of the run).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from fedclip.options import Options

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Concentration = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Concentrations = Concentration | tuple[Concentration, ...]


class Iid(Options):
    """Everybody the same number of examples (one more or less), drawn at random."""

    name: Literal["iid"]


class Dirichlet(Options):
    """Each label is dealt by proportions drawn from Dirichlet(alpha) over users (arXiv 1905.12022, 1909.06335)."""

    name: Literal["dirichlet"]
    alpha: Concentrations = 0.5
    """One number, or one for each user."""
    min_partition_size: NotNegative = 0
    """Drawn anew, ten times at most, until each user has so many examples."""
    self_balancing: bool = False
    """Who has more than the average gets nothing of the labels that are still to be dealt."""


class InnerDirichlet(Options):
    """Users of given sizes, each with its own distribution of labels drawn from Dirichlet(alpha) (arXiv 2111.04263)."""

    name: Literal["inner_dirichlet"]
    partition_sizes: tuple[Count, ...]
    """Examples of each user."""
    alpha: Concentrations = 0.5
    """One number, or one for each label."""


class Pathological(Options):
    """So many labels a user (arXiv 1602.05629), whose examples are shared evenly by all who have the label."""

    name: Literal["pathological"]
    num_classes_per_partition: Count
    class_assignment_mode: Literal["random", "deterministic", "first-deterministic"] = "random"


class Shards(Options):
    """Sorted by label and cut into shards of equal size, of which each user gets so many at random (arXiv 1602.05629)."""

    name: Literal["shard"]
    num_shards_per_partition: Count | None = None
    shard_size: Count | None = None
    keep_incomplete_shard: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_shards_per_partition is None and self.shard_size is None:
            raise ValueError("expected num_shards_per_partition or shard_size, got neither; 2 shards a user are the paper's")
        return self


class Sizes(Options):
    """Users of given sizes, their examples drawn at random."""

    name: Literal["size"]
    partition_sizes: tuple[Count, ...]
    """Examples of each user."""


class Linear(Options):
    """User n has a number of examples in proportion to n (from 1), drawn at random."""

    name: Literal["linear"]


class Square(Options):
    """User n has a number of examples in proportion to n squared, drawn at random."""

    name: Literal["square"]


class Exponential(Options):
    """User n has a number of examples in proportion to exp(n), drawn at random."""

    name: Literal["exponential"]


class Distribution(Options):
    """Numbers of examples by label from an array, as the power law of arXiv 1812.06127 needs them."""

    name: Literal["distribution"]
    distribution_array: tuple[tuple[float, ...], ...]
    """A row a label, with (labels a user) * (users) / (labels) columns."""
    num_unique_labels_per_partition: Count
    preassigned_num_samples_per_label: NotNegative = 0
    rescale: bool = True


class NaturalId(Options):
    """Who made an example owns it: for data that says so."""

    name: Literal["natural_id"]


class GroupedNaturalId(Options):
    """So many of those who made examples are one user."""

    name: Literal["grouped_natural_id"]
    group_size: Count
    mode: Literal["allow-smaller", "allow-bigger", "drop-reminder", "strict"] = "allow-smaller"


PartitionOptions = Annotated[
    Iid
    | Dirichlet
    | InnerDirichlet
    | Pathological
    | Shards
    | Sizes
    | Linear
    | Square
    | Exponential
    | Distribution
    | NaturalId
    | GroupedNaturalId,
    Field(discriminator="name"),
]
"""Any of them, told apart by `name`, which has no default: the name of a run leaves defaults out."""
