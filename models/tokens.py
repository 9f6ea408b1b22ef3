"""Learned tokens: trigger words such as <dog> that stand for one or several trained embedding rows."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ConfigError

_TRIGGER = re.compile(r"<[^\s<>():\\\[\]{},|]+>")


def validate_trigger(trigger: str) -> str:
    """Return ``trigger`` unchanged, or raise ConfigError when prompts could not carry it.

    Angle brackets keep a trigger from colliding with ordinary words; parentheses, brackets and
    colons would be read as weights by prompt parsers.
    """
    if not isinstance(trigger, str) or not _TRIGGER.fullmatch(trigger):
        raise ConfigError(
            f"token {trigger!r} is not usable in prompts; write one word in angle brackets without "
            "spaces, commas, colons or brackets, such as <dog>"
        )
    return trigger


def plain_name(trigger: str) -> str:
    """``<dog>`` -> ``dog``, fit for file and tensor names."""
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in trigger.strip("<>"))


def embedding_stems(name: str, triggers: Sequence[str]) -> list[str]:
    """File names, without ending, of the learned tokens that belong to a LoRA file called ``name``.

    A single token's file is named like the LoRA; with several tokens each also carries its own name.
    """
    return [name] if len(triggers) == 1 else [f"{name}_{plain_name(trigger)}" for trigger in triggers]


@dataclass(frozen=True)
class LearnedToken:
    """A trigger word, the word it starts from, and how many embedding rows it owns."""

    trigger: str
    initializer: str = ""
    """Word whose embedding the rows start from; '' starts from noise."""
    rows: int = 1

    def __post_init__(self) -> None:
        validate_trigger(self.trigger)
        if not isinstance(self.initializer, str):
            raise ConfigError(f"token {self.trigger} starts from {self.initializer!r}; give a word, or '' for noise")
        if not isinstance(self.rows, int) or isinstance(self.rows, bool):
            raise ConfigError(f"token {self.trigger} has {self.rows!r} rows; give a whole number, at least 1")
        if self.rows < 1:
            raise ConfigError(f"token {self.trigger} has {self.rows} rows; it needs at least 1")


def check_distinct(tokens: Sequence[LearnedToken]) -> None:
    """Raise ConfigError when a trigger occurs twice; prompts ignore case, so does this."""
    seen: set[str] = set()
    for token in tokens:
        if token.trigger.lower() in seen:
            raise ConfigError(f"token {token.trigger} is used twice; give every learned token a name of its own")
        seen.add(token.trigger.lower())


def trigger_pattern(triggers: Sequence[str]) -> re.Pattern[str] | None:
    """Pattern that finds any of the triggers, longest first, ignoring case; None without triggers."""
    if not triggers:
        return None
    ordered = sorted(triggers, key=len, reverse=True)
    return re.compile("(" + "|".join(re.escape(trigger) for trigger in ordered) + ")", re.IGNORECASE)


def split_prompt(prompt: str, triggers: Sequence[str]) -> list[str | int]:
    """Cut a prompt at its triggers: text pieces as str, triggers as their index in ``triggers``.

    Empty pieces are dropped. ``split_prompt("a <dog> runs", ["<dog>"]) == ["a ", 0, " runs"]``.
    """
    pattern = trigger_pattern(triggers)
    if pattern is None:
        return [prompt] if prompt else []
    pieces = pattern.split(prompt)
    return [_which(piece, triggers) if place % 2 else piece for place, piece in enumerate(pieces) if piece]


def _which(found: str, triggers: Sequence[str]) -> int:
    # Not by comparing lower-case spellings: ignoring case, a pattern also takes dotless ı for i and ſ for s.
    exact = [position for position, trigger in enumerate(triggers) if trigger == found]
    alike = (p for p, trigger in enumerate(triggers) if re.fullmatch(re.escape(trigger), found, re.IGNORECASE))
    return exact[0] if exact else next(alike)


def replace_triggers(prompt: str, replacements: dict[str, str]) -> str:
    """Replace every trigger by its word, ignoring case; how a base prompt is made from a caption."""
    pattern = trigger_pattern(list(replacements))
    if pattern is None:
        return prompt
    triggers, words = list(replacements), list(replacements.values())
    return pattern.sub(lambda match: words[_which(match.group(0), triggers)], prompt)


def random_rows(draws: Tensor, table: Tensor) -> Tensor:
    """Starting rows for a token without initializer: standard normal draws times the table's std.

    Args:
        draws: (rows, dim), standard normal.
        table: the encoder's whole embedding table, (vocabulary, dim).
    """
    return draws * table.std().to(draws)


def remembered_norms(rows: Tensor, *, scalar: Tensor | None = None) -> Tensor:
    """Norm that each row is returned to after every optimizer step, shape (rows, 1).

    ``scalar`` gives all rows one value. The authors (kyungmnlee/dco, customize.py) do so with the
    table's std for tokens without initializer, which shrinks them far below any real token; the
    default remembers each starting row's own norm.
    """
    if scalar is not None:
        return scalar.to(rows).expand(len(rows), 1).clone()
    return rows.norm(dim=-1, keepdim=True)


def retract(rows: Tensor, norms: Tensor) -> Tensor:
    """Rows scaled back to their remembered norms: row / ‖row‖ · norm. Shapes (rows, dim) and (rows, 1)."""
    return F.normalize(rows, dim=-1) * norms


def repeat_to_rows(rows: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of an initializer's rows, repeating the last one when it has fewer."""
    index = torch.arange(count).clamp(max=len(rows) - 1)
    return rows[index.to(rows.device)]
