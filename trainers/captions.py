"""Captions: one for all or one each, the learned tokens in them, and base captions derived from them."""

from collections.abc import Sequence
from typing import Any

from ..models.errors import DatasetError
from ..models.tokens import LearnedToken, replace_triggers, split_prompt


def tokens_in(text: str, triggers: Sequence[str]) -> set[int]:
    """Indices of the triggers that a text contains."""
    return {piece for piece in split_prompt(text, triggers) if isinstance(piece, int)}


def refuse_tokens(kind: str, name: str, text: str, triggers: Sequence[str]) -> None:
    """Raise DatasetError when a text meant for the base model contains a learned token."""
    if found := sorted(tokens_in(text, triggers)):
        raise DatasetError(
            f"{name}: {kind} {text!r} contains the learned token {triggers[found[0]]}, which the base model "
            "does not know; write it in ordinary words"
        )


def spread(values: Any, count: int, kind: str, *, one_for_all: bool = True) -> list[Any]:
    """A list of ``count`` values from None, one string, one value for all, or one value each."""
    if values is None:
        return [None] * count
    values = [values] if isinstance(values, str) else list(values)
    if len(values) == 1 and one_for_all:
        return values * count
    if len(values) != count:
        alternatives = f"{count}, or 1 for all of them" if one_for_all else str(count)
        raise DatasetError(f"found {len(values)} {kind}s for {count} pictures; give {alternatives}")
    return values


def clean(text: str | None) -> str:
    """Runs of white space, line ends among them, become one space; None becomes ''."""
    return " ".join((text or "").split())


def derive_base(caption: str, tokens: Sequence[LearnedToken], name: str) -> str:
    """The caption with each token replaced by its initializer; DatasetError when a token it uses has none."""
    wordless = {token.trigger for token in tokens if not token.initializer.strip()}
    triggers = [token.trigger for token in tokens]
    for index in sorted(tokens_in(caption, triggers)):
        if triggers[index] in wordless:
            raise DatasetError(
                f"{name}: token {triggers[index]} has no initializer to make a base caption from; "
                "give the base captions, or an initializer word such as 'dog'"
            )
    return clean(replace_triggers(caption, {token.trigger: token.initializer for token in tokens}))
