"""Stands in for torchvision, of which the quickstart takes three transforms."""
