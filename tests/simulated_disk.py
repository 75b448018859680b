"""A disk that remembers in which order things were done to it, and shows what a crash after any of them could have left behind."""

from pathlib import Path

from fedclip.storage import Storage

WAYS = ("kept", "dropped", "torn", "named")
"""What a crash does to what was not synced: it is all there; all gone; each write half there; the names there and the contents gone."""


class Recorder(Storage):
    """The real disk, with a log of all that was changed."""

    def __init__(self) -> None:
        self.log: list[tuple] = []

    def write(self, path, chunks):
        data = b"".join(bytes(c) for c in chunks)
        super().write(path, [data])
        self.log.append(("write", path, data))

    def append(self, path, data):
        super().append(path, data)
        self.log.append(("append", path, data))

    def truncate(self, path, size):
        super().truncate(path, size)
        self.log.append(("truncate", path, size))

    def sync(self, path):
        super().sync(path)
        self.log.append(("sync", path))

    def rename(self, old, new):
        super().rename(old, new)
        self.log.append(("rename", old, new))

    def sync_folder(self, folder):
        super().sync_folder(folder)
        self.log.append(("sync_folder", folder))

    def remove(self, path):
        super().remove(path)
        self.log.append(("remove", path))


class _File:
    def __init__(self) -> None:
        self.data, self.durable = b"", b""


def after_crash(log: list[tuple], way: str) -> dict[Path, bytes]:
    """Return the files that a crash after the last of these operations leaves."""
    names: dict[Path, _File] = {}
    durable: dict[Path, _File] = {}
    for name, path, *more in log:
        if name == "write":
            names.setdefault(path, _File()).data = more[0]
        elif name == "append":
            names.setdefault(path, _File()).data += more[0]
        elif name == "truncate":
            names[path].data = names[path].data[: more[0]]
        elif name == "sync":
            names[path].durable = names[path].data
        elif name == "rename":
            names[more[0]] = names.pop(path)
        elif name == "remove":
            names.pop(path)
        elif name == "sync_folder":
            durable = {p: f for p, f in durable.items() if p.parent != path} | {p: f for p, f in names.items() if p.parent == path}
    if way == "kept":
        return {p: f.data for p, f in names.items()}
    if way == "dropped":
        return {p: f.durable for p, f in durable.items()}
    return {p: f.durable if way == "named" else _torn(f) for p, f in names.items()}


def _torn(file: _File) -> bytes:
    kept = file.durable if file.data.startswith(file.durable) else b""
    return kept + file.data[len(kept) : len(kept) + (len(file.data) - len(kept)) // 2]
