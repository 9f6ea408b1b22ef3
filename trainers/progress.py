"""How training tells what it is doing and learns that it should stop."""

import sys
import time
from typing import Protocol, runtime_checkable

from PIL import Image


class Cancelled(Exception):  # noqa: N818 -- not an error: the user asked for it
    """The user stopped the work before there was anything to keep."""


@runtime_checkable
class Progress(Protocol):
    """What a training loop needs from whoever watches it."""

    def report(self, step: int, total: int, message: str = "", preview: Image.Image | None = None) -> None:
        """Show that ``step`` of ``total`` is done, with a line of text and perhaps a picture."""

    def cancelled(self) -> bool:
        """Whether the user wants to stop; asked before every forward pass."""


class SilentProgress:
    """Shows nothing and is never cancelled."""

    def report(self, step: int, total: int, message: str = "", preview: Image.Image | None = None) -> None:
        pass

    def cancelled(self) -> bool:
        return False


class FollowerProgress(SilentProgress):
    """For the processes that are not the writer: silent, but the user's wish to stop reaches them too."""

    def __init__(self, leader: Progress) -> None:
        self._leader = leader

    def cancelled(self) -> bool:
        return self._leader.cancelled()


class TerminalProgress:
    """A progress bar on one terminal line; the loop turns Ctrl-C into a clean stop."""

    width = 30

    def __init__(self, stream=None) -> None:
        self._stream = stream or sys.stderr
        self._started = time.monotonic()
        self._last_draw = float("-inf")
        self._interrupted = False

    def interrupt(self, *_signal: object) -> None:
        """Ask for a clean stop; fits signal.signal as a handler."""
        self._interrupted = True

    def report(self, step: int, total: int, message: str = "", preview: Image.Image | None = None) -> None:
        now = time.monotonic()
        if step < total and now - self._last_draw < 0.1:
            return
        self._last_draw = now
        filled = round(self.width * step / max(total, 1))
        bar = "█" * filled + "·" * (self.width - filled)
        line = f"\r{bar} {step}/{total} {message} [{now - self._started:.0f} s]"
        self._stream.write(line.ljust(100) + ("\n" if step >= total else ""))
        self._stream.flush()

    def cancelled(self) -> bool:
        return self._interrupted
