"""Checks of list widgets before a run is queued, which hosts before 0.10 leave to the nodes.

An input that ``validate_inputs`` names is checked there alone; a value that arrives over a link is None there.
"""

from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from ..trainers.config import TrainConfig


def single(values: Any) -> Any:
    """The one value of an input of a node that takes lists, or None.

    It arrives in a list; before the execution that of a link, which nobody knows yet, in a tuple.
    """
    return next(iter(values), None) if isinstance(values, list | tuple) else values


def known(kind: str, name: str | None, names: Iterable[str]) -> bool | str:
    """True when ``name`` is one of ``names`` or linked, else the sentence to refuse it with."""
    return True if name is None or name in names else f"there is no {kind} named {name!r}; choose one from the list"


def known_settings(config: type[TrainConfig], **values: str | None) -> bool | str:
    """The same for settings whose choices a config class lists."""
    kinds = get_type_hints(config)
    return first_refusal(known(name, value, get_args(kinds[name])) for name, value in values.items())


def first_refusal(checks: Iterable[bool | str]) -> bool | str:
    """The first sentence among the results of several checks, or True."""
    return next((check for check in checks if check is not True), True)
