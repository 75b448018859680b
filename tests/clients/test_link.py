"""A SuperLink that is away for a while is asked again, and one that stays away is an error that says what to do."""

from types import SimpleNamespace

import httpx
import pytest
from flwr.supercore.run import RunNotRunningException

from clients.link import Link, LinkError, Unanswered


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://link/v1/runtime")
    return httpx.HTTPStatusError(f"status {code}", request=request, response=httpx.Response(code, request=request))


class Grid:
    """A grid that raises what it is told to, and then answers."""

    def __init__(self, *errors: BaseException, most: int = 10) -> None:
        self.errors, self.most, self.pushed = list(errors), most, list[list[str]]()

    def _fail(self) -> None:
        if self.errors:
            raise self.errors.pop(0)

    def get_nodes(self):
        self._fail()
        return [SimpleNamespace(node_id=5)]

    def get_node_ids(self):
        self._fail()
        return [5]

    def push_messages(self, messages):
        self.pushed.append(list(messages))
        self._fail()
        return [f"id of {m}" for m in messages] if len(messages) <= self.most else []

    def pull_messages(self, ids):
        self._fail()
        return [f"reply to {id}" for id in ids]


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let time pass in no time."""
    slept, now = list[float](), [0.0]
    monkeypatch.setattr("clients.link.time.monotonic", lambda: now[0])
    monkeypatch.setattr("clients.link.time.sleep", lambda seconds: slept.append(seconds) or now.__setitem__(0, now[0] + seconds))
    return slept


TRANSIENT = [httpx.ConnectError("down"), httpx.ReadTimeout(""), status(500), status(503), status(429)]


@pytest.mark.parametrize("error", TRANSIENT, ids=repr)
def test_what_was_not_answered_is_asked_again(error, slept):
    assert [node.node_id for node in Link(Grid(error, error), 10).nodes()] == [5]
    assert Link(Grid(error), 10).node_ids() == {5}
    grid = Grid(error)
    assert Link(grid, 10).push(["a", "b"]) == ["id of a", "id of b"]
    assert grid.pushed == [["a", "b"]] * 2  # the same messages, which have the ids that they had
    assert slept == [0.5] * 4


def test_who_stays_away_is_an_error_that_says_what_to_do(slept):
    with pytest.raises(Unanswered, match=r"asked to take messages for 3 s and failed \(ConnectError: down\).*start it again.*resume"):
        Link(Grid(*[httpx.ConnectError("down")] * 100), 3).push(["a"])
    assert sum(slept) == 3
    with pytest.raises(Unanswered):
        Link(Grid(httpx.ConnectError("down")), 3).node_ids(patience=0)
    assert sum(slept) == 3


@pytest.mark.parametrize(("error", "said"), [(status(400), "refused"), (RunNotRunningException(), "has ended this run.*resume")], ids=repr)
def test_who_refuses_is_not_asked_again(error, said, slept):
    for call in (lambda link: link.nodes(), lambda link: link.push(["a"])):
        with pytest.raises(LinkError, match=said):
            call(Link(Grid(error), 10))
    assert not slept


def test_of_a_run_that_has_ended_no_reply_is_blamed():
    with pytest.raises(LinkError, match="has ended this run"):
        Link(Grid(RunNotRunningException()), 10).pull("id", 10)
    link = Link(Grid(httpx.ReadTimeout("")), 10)
    with pytest.raises(Unanswered, match="ReadTimeout"):
        link.pull("id", 10)
    assert link.pull("id", 10) == ["reply to id"]


def test_messages_that_are_too_long_together_are_sent_one_by_one():
    grid = Grid(most=1)
    assert Link(grid, 10).push(["a", "b"]) == ["id of a", "id of b"]
    with pytest.raises(LinkError, match="A single message is too long"):
        Link(Grid(most=0), 10).push(["a"])
