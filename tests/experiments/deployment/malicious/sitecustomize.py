"""What the operator of a node can do: Python imports this file first where its folder is in PYTHONPATH, and it changes what follows."""

import importlib.abc
import importlib.util
import sys
from types import ModuleType

import attacks

CHANGES = {
    "clients.messages": attacks.change_messages,
    "fedclip.client": attacks.change_client,
    "flwr.supernode.fleet_http_client": attacks.change_supernode,
}


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules as they are, and changes some once they are loaded."""

    def __init__(self) -> None:
        self.busy = False
        self.real: dict[str, importlib.abc.Loader] = {}

    def find_spec(self, name, path, target=None):
        if name not in CHANGES or self.busy:
            return None
        self.busy = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            self.real[name], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.real[spec.name].create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real[module.__name__].exec_module(module)
        CHANGES[module.__name__](module)


sys.meta_path.insert(0, Changed())
