"""Private, bandwidth-thrifty federated learning: algorithms, tasks and measurement in plain PyTorch and NumPy.

Nothing in this package imports Flower or Ray, and importing the package itself does not import PyTorch.
"""

__version__ = "0.1.0"
