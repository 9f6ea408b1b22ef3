"""Custom Diffusion's random sizes, learning rates and files against the authors' code."""

import numpy as np
import pytest
from PIL import Image

from comfyui_personalize.models.dvar.rescaling import rescaled


@pytest.mark.golden("dvar", "custom_rescale_mask")
def test_pictures_at_random_sizes(case):
    picture = Image.fromarray(case.inputs["image"].numpy().astype(np.uint8))
    for key in [key for key in case.config if key.startswith("draws_")]:
        name, draws = key.removeprefix("draws_"), iter(case.config[key])
        made = rescaled(picture, case.config["size"], lambda low, high, draws=draws: next(draws))
        assert next(draws, None) is None
        case.check(f"{name}_image", made.pixels.permute(1, 2, 0))
        case.check(f"{name}_mask", made.mask)
        assert made.prefix + "PROMPT" == case.config[f"prompt_{name}"]
