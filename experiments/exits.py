"""How a command ends: what a person did wrong is said in lines on standard error, never as a traceback."""

import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar

import typer

from fedclip.options import ConfigError

T = TypeVar("T")


def guarded(call: Callable[[], T]) -> T:
    """Return what a call returns; a `ConfigError` ends the command with exit status 2, an interruption with 130."""
    try:
        return call()
    except ConfigError as error:
        refuse(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def refuse(message: str) -> NoReturn:
    """End the command with exit status 2, and say why."""
    for line in message.splitlines():
        print(f"fedclip: {line}", file=sys.stderr)
    raise typer.Exit(2)
