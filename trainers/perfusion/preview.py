"""Preview pictures while a concept is trained: local key locking on the left, global on the right."""

from PIL import Image
from torch import Tensor

from ..prepared import PreviewMaker
from ..rank_one_edits import RankOneEdits


class LockedPreviews:
    """Shows two pictures of the same prompt and noise side by side."""

    def __init__(self, previews: PreviewMaker, edits: RankOneEdits, superclass: Tensor) -> None:
        """Args:
        previews: samples one picture.
        superclass: encoding of the preview prompt with the superclass word, and before it that of the empty prompt
            where guidance asks for it, as RankOneEdits takes them.
        """
        self.last: Image.Image | None = None
        self._previews, self._edits, self._superclass = previews, edits, superclass

    def make(self, step: int) -> Image.Image | None:
        """Both pictures with the weights as they are now; None when the user cancels meanwhile."""
        pictures = []
        try:
            for locked in (None, self._superclass):
                self._edits.superclass = locked
                picture = self._previews.make(step)
                if picture is None:
                    return None
                pictures.append(picture)
        finally:
            self._edits.superclass = None
        side = pictures[0].width
        self.last = Image.new("RGB", (2 * side, side))
        for number, picture in enumerate(pictures):
            self.last.paste(picture, (number * side, 0))
        return self.last
