"""Text widgets that are read line by line."""


def lines_of(text: str) -> list[str]:
    """The lines of a text without the space around them; empty ones do not count."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def lines_or_strings(values: list[str]) -> list[str]:
    """Lines of a widget of a node that takes lists, or the strings that another node gives, one per picture."""
    return lines_of(values[0]) if len(values) == 1 else [value.strip() for value in values]
