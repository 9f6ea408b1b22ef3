"""Draw the pictures that the template browser shows beside the workflows: `python tests/browser/draw_thumbnails.py`."""

from pathlib import Path

import painting
import thumbnails_dco
import thumbnails_dvar
import thumbnails_encoder
import thumbnails_lookahead
import thumbnails_perfusion

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
THUMBNAILS = (
    thumbnails_dco.THUMBNAILS
    | thumbnails_dvar.THUMBNAILS
    | thumbnails_encoder.THUMBNAILS
    | thumbnails_lookahead.THUMBNAILS
    | thumbnails_perfusion.THUMBNAILS
)


def main() -> None:
    """Write all thumbnails."""
    for name, paint in THUMBNAILS.items():
        painting.save(paint, WORKFLOWS / f"{name}.jpg")


if __name__ == "__main__":
    main()
