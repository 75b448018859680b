"""Stands in for flwr-datasets' partitioners; any number of partitions can be had, as images are generated."""


class IidPartitioner:
    def __init__(self, *, num_partitions):
        self.num_partitions = num_partitions
