"""The strict base of every configuration section, and errors that name the key, the value, what is allowed and the nearest known key.

Imports no PyTorch: whoever mistypes a key is told at once.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, create_model
from pydantic.fields import FieldInfo

T = TypeVar("T", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be run. The message is all that a user needs to see."""


class Options(BaseModel):
    """A frozen section of an experiment file. Unknown keys are errors, so a misspelt key never passes silently."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def unknown(key: str, value: Any, known: Iterable[str], kind: str) -> ConfigError:
    """Return the error for a name that is not one of the known ones."""
    names = sorted(known)
    near = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return ConfigError(f"{key}: '{value}' is no known {kind}; known: {', '.join(names)}.{hint}")


def check_arguments(
    function: Callable[..., Any], given: Mapping[str, Any], where: str, hidden: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Check plain values against the annotated parameters of a function and return them converted, only those that were given.

    Args:
        function: what the arguments are for; its parameters are annotated with types that pydantic knows.
        given: plain values by name.
        where: the dotted key of the section, for messages.
        hidden: parameters that the file may not set.

    Raises:
        ConfigError: an unknown or missing argument, or a value that is not allowed.
    """
    checked = _checked(function, given, where, hidden or {})
    return {name: getattr(checked, name) for name in given}


def with_defaults(
    function: Callable[..., Any], given: Mapping[str, Any], where: str, hidden: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the same values, checked, as plain data, with the defaults of all the others that have one and it is not None.

    Raises:
        ConfigError: as `check_arguments`.
    """
    return _checked(function, given, where, hidden or {}).model_dump(exclude_none=True)


def without_defaults(
    function: Callable[..., Any], given: Mapping[str, Any], where: str, hidden: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the same values, checked, as plain data, without those that are the default.

    Raises:
        ConfigError: as `check_arguments`.
    """
    return _checked(function, given, where, hidden or {}).model_dump(exclude_defaults=True)


def _checked(function: Callable[..., Any], given: Mapping[str, Any], where: str, hidden: Mapping[str, Any]) -> BaseModel:
    return validate(_model_of(function, frozenset(hidden)), given, where)


@lru_cache(maxsize=128)  # a worker builds the same stages in every round, and a model takes a millisecond to make
def _model_of(function: Callable[..., Any], hidden: frozenset[str]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in hidden:
            annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
            fields[name] = (annotation, ... if parameter.default is inspect.Parameter.empty else parameter.default)
    model: type[BaseModel] = create_model(
        function.__name__, __config__=ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True), **fields
    )
    return model


def validate(model: type[T], values: Any, where: str = "") -> T:
    """Return `model` filled with plain values.

    Args:
        model: the section.
        values: what the file says.
        where: the dotted key of the section, for messages.

    Raises:
        ConfigError: one line for each wrong key.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, dict(e), values, where) for e in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def _explain(model: type[BaseModel], error: dict[str, Any], values: Any, where: str) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join([*([where] if where else []), *_keys_of(location, values, error["type"] in ("extra_forbidden", "missing"))])
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        return f"{key}: unknown key (its value is {error['input']!r}); known here: {', '.join(known) or 'none'}.{hint}"
    if error["type"] == "missing":
        return f"{key}: missing; add it to the file or give it by --set {key}=VALUE."
    message = str(error["msg"]).removeprefix("Value error, ").rstrip(".")
    return f"{key}: {message[0].lower() + message[1:]}; got {error['input']!r}."


def _keys_of(location: list[str], values: Any, absent: bool) -> list[str]:
    """Return the keys of an error's location: pydantic puts the tags of unions between them, which nobody wrote.

    With `absent` the last part is a key that is not there, or should not be.
    """
    keys = []
    for n, part in enumerate(location):
        if isinstance(values, Mapping) and part in values:
            keys.append(part)
            values = values[part]
        elif isinstance(values, list | tuple) and part.isdigit():
            keys.append(part)
            values = values[int(part)] if int(part) < len(values) else None
        elif absent and n == len(location) - 1:
            keys.append(part)
    return keys


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Return the keys of the section at a path below `model`; a union's tag in the path picks its member."""
    candidates: list[type[BaseModel]] = [model]
    for part in path:
        inner: list[type[BaseModel]] = []
        for candidate in candidates:
            info = candidate.model_fields.get(part)
            inner += _models_in(info) if info else []
        tagged = [c for c in candidates if _tag(c) == part]
        candidates = inner or tagged or candidates
    return sorted({name for c in candidates for name in c.model_fields})


def _models_in(info: FieldInfo) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    queue: list[Any] = [info.annotation]
    while queue:
        annotation = queue.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        queue += list(getattr(annotation, "__args__", ()))
    return found


def _tag(model: type[BaseModel]) -> str | None:
    for key in ("kind", "name"):
        info = model.model_fields.get(key)
        if info is not None and isinstance(info.default, str):
            return info.default
        values = get_args(info.annotation) if info is not None else ()
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
    return None
