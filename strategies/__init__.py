"""Federated methods: a recipe a published method, and the one Flower strategy that runs any of them."""
