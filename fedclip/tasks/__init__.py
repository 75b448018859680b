"""Tasks: each joins a model, its users' data, its loss and its metrics behind the protocol of `base`."""
