"""The roster: which nodes take part, by which key, and whose users they have. It is a file that its operator keeps.

An id belongs to its node for ever, also when the node is revoked or has a new key: whoever once took part under it can be told from all
others, in samplers, in states of users and in the ledger. Imports neither Flower nor PyTorch.
"""

import difflib
import re
import tomllib
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as with_changes
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import tomli_w

from clients.signing import public_line
from fedclip.options import ConfigError, unknown
from fedclip.storage import Storage, replace

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # names of files, too
LARGEST = 2**63  # ids are signed 64-bit integers wherever they travel
HEADER = """# Who takes part, kept by `fedclip keys`, which leaves no other comments here. Ids are given once, for ever:
# change no `first` or `users`, and take no node away, but revoke it.

"""


@dataclass(frozen=True)
class Enrolled:
    """A node that was let in; the ids `first` to `first + users - 1` are its users', for ever.

    Args:
        name: letters, digits and `._-`, up to 64, the first one a letter or a digit.
        key: its public key, as `public_line` writes it.
        first: the first of its ids, at least 0.
        users: how many users it has, at least 1.
        revoked: it may no longer take part.

    Raises:
        ConfigError: a value that is not allowed.
    """

    name: str
    key: str
    first: int
    users: int
    revoked: bool = False

    def __post_init__(self) -> None:
        check_name(self.name)
        if not isinstance(self.key, str) or public_line(self.key) != self.key:
            raise ConfigError(f"{self.name}: expected a key as `public_line` writes it, without comment, got {self.key!r}.")
        if type(self.first) is not int or self.first < 0:
            raise ConfigError(f"{self.name}: expected first >= 0, got {self.first!r}.")
        if type(self.users) is not int or not 1 <= self.users <= LARGEST - self.first:
            raise ConfigError(f"{self.name}: expected 1 user or more, and ids below 2^63, got users = {self.users!r}.")
        if type(self.revoked) is not bool:
            raise ConfigError(f"{self.name}: expected revoked = true or false, got {self.revoked!r}.")

    @property
    def ids(self) -> range:
        """Return the ids of its users."""
        return range(self.first, self.first + self.users)


@dataclass(frozen=True)
class Roster:
    """All nodes that were ever enrolled.

    Raises:
        ConfigError: two of them have the same name, the same key or an id in common.
    """

    nodes: tuple[Enrolled, ...] = ()

    def __post_init__(self) -> None:
        for what, values in (("name", [n.name for n in self.nodes]), ("key", [n.key for n in self.nodes])):
            seen: dict[str, str] = {}
            for node, value in zip(self.nodes, values, strict=True):
                if value in seen:
                    raise ConfigError(f"{node.name}: the {what} is that of {seen[value]} already; each node has its own.")
                seen[value] = node.name
        ordered = sorted(self.nodes, key=lambda n: n.first)
        for before, node in pairwise(ordered):
            if node.first < before.ids.stop:
                raise ConfigError(
                    f"{node.name}: its ids {node.first} to {node.ids[-1]} overlap those of {before.name}, {before.first} to "
                    f"{before.ids[-1]}; an id is given once, so take the roster as it was before."
                )

    @property
    def users(self) -> int:
        """Return how many ids were ever given: one past the largest."""
        return max((n.ids.stop for n in self.nodes), default=0)

    def by_key(self, public_line: str) -> Enrolled | None:
        """Return the node of a key, revoked or not; the key as `clients.signing.public_line` writes it."""
        return self._of_key.get(public_line)

    def by_name(self, name: str) -> Enrolled | None:
        """Return the node of a name, revoked or not."""
        return self._of_name.get(name)

    def enroll(self, name: str, key: str, users: int = 1) -> "Roster":
        """Return the roster with another node, which gets the next free ids.

        Raises:
            ConfigError: the name or the key is there, be it revoked, or a value is not allowed.
        """
        node = Enrolled(name, public_line(key), self.users, users)
        for there in (self.by_name(name), self.by_key(node.key)):
            if there is not None:
                what, advice = ("name", "take another") if there.name == name else ("key", "make one: `fedclip keys node`")
                state = "revoked" if there.revoked else "enrolled"
                raise ConfigError(f"{name}: there is a node of this {what}, {there.name} ({state}); {advice}, or `fedclip keys rotate`.")
        return Roster((*self.nodes, node))

    def revoke(self, name: str) -> "Roster":
        """Return the roster in which a node may no longer take part; its ids and its key are nobody else's. Twice is as once.

        Raises:
            ConfigError: there is no such node.
        """
        return self._with(with_changes(self._named(name), revoked=True))

    def rotate(self, name: str, key: str) -> "Roster":
        """Return the roster in which a node has another key, and the same ids.

        Raises:
            ConfigError: there is no such node, it is revoked, or the key is there.
        """
        node = self._named(name)
        if node.revoked:
            raise ConfigError(f"{name}: it is revoked, and stays so; enroll it under another name, with ids of its own.")
        changed = with_changes(node, key=public_line(key))
        there = self.by_key(changed.key)
        if there is not None:
            raise ConfigError(f"{name}: this is the key of {there.name} already; make a new one: `fedclip keys node`.")
        return self._with(changed)

    @classmethod
    def read(cls, path: Path) -> "Roster":
        """Return the roster in a TOML file of `[[node]]` tables.

        Raises:
            ConfigError: there is no such file, or anything in it is wrong.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: no roster can be read there ({error.strerror}); `fedclip keys enroll` makes one.") from None
        except ValueError as error:  # no TOML, or no UTF-8
            raise ConfigError(f"{path}: this is no TOML: {error}.") from None
        try:
            return cls(tuple(_enrolled(n, table) for n, table in enumerate(_tables(values), 1)))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def write(self, path: Path) -> None:
        """Write the TOML file, so that after any crash it is there whole, or as it was before."""
        tables = [{k: v for k, v in asdict(n).items() if k != "revoked" or v} for n in self.nodes]
        replace(Storage(), path, [(HEADER + tomli_w.dumps({"node": tables})).encode()])

    # A round asks for each of its nodes.
    @cached_property
    def _of_key(self) -> dict[str, Enrolled]:
        return {n.key: n for n in self.nodes}

    @cached_property
    def _of_name(self) -> dict[str, Enrolled]:
        return {n.name: n for n in self.nodes}

    def _named(self, name: str) -> Enrolled:
        node = self.by_name(name)
        if node is None:
            near = difflib.get_close_matches(name, self._of_name, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "`fedclip keys list` shows all."
            raise ConfigError(f"{name}: there is no such node in the roster; {hint}")
        return node

    def _with(self, changed: Enrolled) -> "Roster":
        return Roster(tuple(changed if n.name == changed.name else n for n in self.nodes))


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a node.

    Raises:
        ConfigError: it has other characters than letters, digits and `._-`, or more than 64, or begins with one of the last three.
    """
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ConfigError(
            f"Expected the name of a node, of 1 to 64 letters, digits and ._- that begin with a letter or digit, got {name!r}."
        )


def _tables(values: dict[str, object]) -> list[object]:
    for key in values:
        if key != "node":
            raise unknown("roster", key, ["node"], "table")
    tables = values.get("node", [])
    if not isinstance(tables, list):
        raise ConfigError("node: expected a table a node, each under [[node]].")
    return tables


def _enrolled(number: int, table: object) -> Enrolled:
    where = f"node {number}"
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table under [[node]], got {table!r}.")
    known = [f.name for f in fields(Enrolled)]
    for key in table:
        if key not in known:
            raise unknown(where, key, known, "key")
    missing = [name for name in known if name not in table and name != "revoked"]
    if missing:
        raise ConfigError(f"{where}: {missing[0]} is missing; take the roster as it was before, or `fedclip keys enroll` the node anew.")
    try:
        # Written by hand it may have a comment.
        return Enrolled(**(table | {"key": public_line(table["key"])} if isinstance(table["key"], str) else table))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
