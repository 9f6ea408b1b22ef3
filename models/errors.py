"""The errors that users meet: one sentence saying what was found, what was expected and what to do."""


class PersonalizeError(Exception):
    """Base of every error raised on purpose by this project."""


class ConfigError(PersonalizeError):
    """A setting is unknown, of the wrong type or out of its range."""


class FormatError(PersonalizeError):
    """A file is damaged, unsafe or not in the format that was asked for."""


class IncompatibleModelError(PersonalizeError):
    """A file belongs to another model family than the one it is used with."""


class DatasetError(PersonalizeError):
    """Training pictures or captions are missing, unreadable or contradict each other."""


class MissingDependencyError(PersonalizeError):
    """An optional package is needed for what was asked and is not installed."""


class TrainingError(PersonalizeError):
    """Training had to stop: out of memory, or the loss is no longer a number."""
