"""What a person sees while data is indexed: nothing where that is quick, a bar on a terminal, a line elsewhere."""

import io

import pytest
from rich.console import Console

from experiments import live


@pytest.mark.parametrize(("patience", "terminal", "shown"), [(60.0, True, ""), (0.0, True, "120,000"), (0.0, False, "indexing ...\n")])
def test_indexing_shows_where_it_takes_long(monkeypatch: pytest.MonkeyPatch, patience: float, terminal: bool, shown: str) -> None:
    monkeypatch.setattr(live, "SECONDS_BEFORE_BAR", patience)
    out = io.StringIO()
    with live.indexing(Console(file=out, force_terminal=terminal, width=100)) as watch:
        for done in (2000, 120_000):
            watch("indexing", done)
    assert shown in out.getvalue() if terminal and shown else out.getvalue() == shown


def test_workers_are_shown_under_the_rounds_with_their_users_so_far() -> None:
    out = io.StringIO()
    reporter = live.Reporter(3, quiet=False, console=Console(file=out, force_terminal=True, width=100))
    with reporter:
        for users, seconds in ((5, 1.25), (7, 2.5)):
            reporter.worker("worker 0 (process 11 on one)", users, seconds)
            reporter.worker("worker 1 (process 12 on two)", 2 * users, seconds)
    shown = out.getvalue().splitlines()[-3:]
    assert "worker 0 (process 11 on one)  12     2.5" in out.getvalue()
    assert "worker 1 (process 12 on two)  24     2.5" in out.getvalue(), shown
