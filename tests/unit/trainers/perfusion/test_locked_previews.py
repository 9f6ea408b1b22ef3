"""Previews with and without global key locking, side by side, and what a cancel leaves of them."""

import pytest
import torch
from PIL import Image

from comfyui_personalize.trainers.perfusion.preview import LockedPreviews

KEYS = torch.ones(1, 77, 8)


class Edits:
    """Says only what is locked."""

    superclass = None


class Single:
    """Paints red without locking and blue with it; None from the given call on, as after a cancel."""

    def __init__(self, edits, cancel_at=None):
        self.last, self.calls = None, 0
        self._edits, self._cancel_at = edits, cancel_at

    def make(self, step):
        self.calls += 1
        if self._cancel_at is not None and self.calls >= self._cancel_at:
            return None
        self.last = Image.new("RGB", (8, 8), "red" if self._edits.superclass is None else "blue")
        return self.last


def test_locked_keys_are_on_the_right():
    edits = Edits()
    previews = LockedPreviews(Single(edits), edits, KEYS)
    picture = previews.make(1)
    assert picture.size == (16, 8) and picture is previews.last
    assert [picture.getpixel((x, 4)) for x in (0, 7, 8, 15)] == [(255, 0, 0)] * 2 + [(0, 0, 255)] * 2
    assert edits.superclass is None


@pytest.mark.parametrize("cancel_at", (3, 4))
def test_a_cancel_keeps_the_last_pair_and_unlocks_the_keys(cancel_at):
    edits = Edits()
    previews = LockedPreviews(Single(edits, cancel_at), edits, KEYS)
    pair = previews.make(1)
    assert previews.make(2) is None
    assert previews.last is pair and edits.superclass is None
