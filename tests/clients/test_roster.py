"""The roster of enrolled nodes: an id is given once, for ever, and a file that is wrong is refused."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from clients.roster import Enrolled, Roster
from clients.signing import public_line, public_of
from fedclip.options import ConfigError

PRIVATE = [ec.generate_private_key(ec.SECP384R1()) for _ in range(8)]
KEYS = [public_of(key) for key in PRIVATE]
NAMES = ["a", "b-1", "C.x", "9_"]

operations = st.lists(
    st.one_of(
        st.tuples(st.just("enroll"), st.sampled_from(NAMES), st.sampled_from(KEYS), st.integers(1, 5)),
        st.tuples(st.just("revoke"), st.sampled_from(NAMES)),
        st.tuples(st.just("rotate"), st.sampled_from(NAMES), st.sampled_from(KEYS)),
    ),
    max_size=20,
)


@given(operations)
def test_ids_are_given_once_for_ever(steps: list[tuple[str, ...]]) -> None:
    """Beside a model in dicts: whatever is done or refused, ids stay with their names, and none is given twice."""
    roster, ids, revoked = Roster(), {}, set()
    for what, name, *rest in steps:
        keys_there = {n.key for n in roster.nodes}
        there = name in ids
        new_key = rest == [] or rest[0] not in keys_there
        allowed = new_key and (not there if what == "enroll" else there and (what == "revoke" or name not in revoked))
        if not allowed:
            with pytest.raises(ConfigError):
                getattr(roster, what)(name, *rest)
            continue
        roster = getattr(roster, what)(name, *rest)
        if what == "enroll":
            start = sum(len(r) for r in ids.values())
            ids[name] = range(start, start + rest[1])
        elif what == "revoke":
            revoked.add(name)
        if what != "revoke":
            assert roster.by_key(rest[0]) == roster.by_name(name)
    assert {n.name: n.ids for n in roster.nodes} == ids
    assert {n.name for n in roster.nodes if n.revoked} == revoked
    assert roster.users == sum(len(r) for r in ids.values())
    assert all(roster.by_key(n.key) is n and roster.by_name(n.name) is n for n in roster.nodes)


@given(operations)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, ...]]) -> None:
    roster = Roster()
    for what, *rest in steps:
        try:
            roster = getattr(roster, what)(*rest)
        except ConfigError:
            continue
    path = tmp_path_factory.getbasetemp() / "roster.toml"
    roster.write(path)
    assert Roster.read(path) == roster
    assert [p.name for p in path.parent.glob("roster*")] == ["roster.toml"]


def test_a_key_of_any_form_is_one_node() -> None:
    pem = PRIVATE[0].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    roster = Roster().enroll("a", f"{KEYS[0]} comment\n", 2)
    assert roster.by_key(public_line(pem)) == roster.by_name("a") == Enrolled("a", KEYS[0], 0, 2)
    assert roster.by_key(KEYS[1]) is None
    assert roster.by_name("b") is None
    with pytest.raises(ConfigError, match=r"b: there is a node of this key, a \(enrolled\)"):
        roster.enroll("b", pem.decode())


def test_a_revoked_node_keeps_its_name_its_key_and_its_ids() -> None:
    roster = Roster().enroll("a", KEYS[0], 3).revoke("a")
    assert roster.by_key(KEYS[0]) == Enrolled("a", KEYS[0], 0, 3, revoked=True)
    assert roster.revoke("a") == roster
    with pytest.raises(ConfigError, match=r"of this key, a \(revoked\)"):
        roster.enroll("b", KEYS[0])
    with pytest.raises(ConfigError, match=r"of this name, a \(revoked\)"):
        roster.enroll("a", KEYS[1])
    with pytest.raises(ConfigError, match="a: it is revoked, and stays so"):
        roster.rotate("a", KEYS[1])
    assert roster.enroll("b", KEYS[1]).by_name("b").ids == range(3, 4)


def test_an_unknown_name_is_said_with_the_nearest() -> None:
    roster = Roster().enroll("clinic-7", KEYS[0])
    for call in (lambda: roster.revoke("clinic-8"), lambda: roster.rotate("clinic-8", KEYS[1])):
        with pytest.raises(ConfigError, match=r"clinic-8: .*did you mean 'clinic-7'"):
            call()


def test_a_node_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Enrolled("a", KEYS[0], 0, 1).first = 5


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Enrolled("", KEYS[0], 0, 1), "name of a node"),
        (lambda: Enrolled("../a", KEYS[0], 0, 1), "name of a node"),
        (lambda: Enrolled("a" * 65, KEYS[0], 0, 1), "name of a node"),
        (lambda: Enrolled("a\n", KEYS[0], 0, 1), "name of a node"),
        (lambda: Enrolled("a", KEYS[0] + " comment", 0, 1), "without comment"),
        (lambda: Enrolled("a", "AAAA", 0, 1), "public key on P-384"),
        (lambda: Enrolled("a", KEYS[0], -1, 1), "first >= 0, got -1"),
        (lambda: Enrolled("a", KEYS[0], 0, 0), "1 user or more.*users = 0"),
        (lambda: Enrolled("a", KEYS[0], True, 1), "first >= 0, got True"),
        (lambda: Enrolled("a", KEYS[0], 2**63 - 1, 2), "below 2.63"),
        (lambda: Roster().enroll("a", KEYS[0], 0), "1 user or more"),
    ],
)
def test_values_that_cannot_be_are_refused(made: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        made()


def node(name: str = "a", key: str = KEYS[0], first: object = 0, users: object = 2, more: str = "") -> str:
    return f'[[node]]\nname = "{name}"\nkey = "{key}"\nfirst = {first}\nusers = {users}\n{more}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[node]", "no TOML"),
        ("\udcff", "no TOML"),
        ("[[nodes]]", "Did you mean 'node'"),
        ("node = 3", "expected a table a node"),
        ("node = [3]", "node 1: expected a table"),
        (node(more="revokd = true"), "node 1: 'revokd'.*Did you mean 'revoked'"),
        (node(more="revoked = 1"), "node 1: a: expected revoked = true or false, got 1"),
        ('[[node]]\nname = "a"', "node 1: key is missing"),
        (f'[[node]]\nname = 3\nkey = "{KEYS[0]}"\nfirst = 0\nusers = 1', "node 1: .*name of a node.*got 3"),
        ('[[node]]\nname = "a"\nkey = 3\nfirst = 0\nusers = 1', "node 1: a: expected a key"),
        (node(key="ssh-ed25519 AAAA"), "node 1: .*public key on P-384"),
        (node(first=0.5), "first >= 0, got 0.5"),
        (node(users='"2"'), "users = '2'"),
        (node() + node(key=KEYS[1], first=2), "a: the name is that of a already"),
        (node() + node("b", first=2), "b: the key is that of a already"),
        (node() + node("b", f"{KEYS[0]} comment", first=2), "b: the key is that of a already"),
        (node() + node("b", KEYS[1], 1), "b: its ids 1 to 2 overlap those of a, 0 to 1"),
        (node("b", KEYS[1], 1) + node(more="revoked = true"), "b: its ids 1 to 2 overlap those of a, 0 to 1"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "roster.toml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=f"^{path}: .*{said}"):
        Roster.read(path)


def test_a_file_by_hand_may_have_comments_and_gaps(tmp_path: Path) -> None:
    path = tmp_path / "roster.toml"
    path.write_text("# ours\n" + node("b", KEYS[1], 10, 5) + node(key=f"{KEYS[0]} at the door"), encoding="utf-8")
    roster = Roster.read(path)
    assert [(n.name, n.ids, n.key) for n in roster.nodes] == [("b", range(10, 15), KEYS[1]), ("a", range(2), KEYS[0])]
    assert roster.enroll("c", KEYS[2]).by_name("c").ids == range(15, 16)


def test_no_roster_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.toml: .*No such file.*fedclip keys enroll"):
        Roster.read(tmp_path / "none.toml")
