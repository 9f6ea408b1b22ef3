"""Encode Identity against the tokens that the LCM-Lookahead authors' code makes of a picture."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.parity

_spec = importlib.util.spec_from_file_location(
    "personalize_recorded_cases", Path(__file__).parents[1] / "parity" / "conftest.py"
)
recorded = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recorded)

FILES = recorded.cases("lookahead", ("01b_adapter_from_image",))
CASES = pytest.mark.parametrize("path", FILES, ids=[f"lookahead/{path.stem}" for path in FILES])
LEVEL = 1 / 255


@pytest.fixture
def load_case(comfy, tmp_path):
    """load_case(path) -> the case, its encoder, and its CLIP-Vision as the host's own class."""
    import comfy.clip_vision

    from comfyui_personalize.models.lookahead import Resampler
    from comfyui_personalize.models.lookahead.encoder import LookaheadEncoder

    def load(path):
        case = recorded.Case(path, [])
        shared = case.sibling(case.config["weights"].removesuffix(".safetensors"))
        settings = tmp_path / "clip.json"
        settings.write_text(json.dumps({"model_type": "clip_vision_model", "num_channels": 3, **shared.config["clip"]}))
        vision = comfy.clip_vision.ClipVisionModel(settings)
        weights = {key.removeprefix("image_encoder."): value for key, value in shared.weights.items()}
        missing, _ = vision.load_sd(weights)
        assert not missing
        tensors = {key: value for key, value in shared.weights.items() if key.startswith("image_proj_model.")}
        resampler = Resampler.from_tensors(tensors, prefix="image_proj_model.", head_dim=shared.config["head_dim"])
        return case, LookaheadEncoder(resampler.requires_grad_(False), {}, {}, {}, "recorded", {}), vision

    return load


def pictures_of(case):
    """What the authors load, uint8 (batch, height, width, 3)."""
    return (255 * ((case.inputs["image"].clamp(-1, 1) + 1) / 2)).round().to(torch.uint8).permute(0, 2, 3, 1)


def as_pil_resizes(picture, side):
    height, width = (side * edge // min(picture.shape[:2]) for edge in picture.shape[:2])
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return torch.from_numpy(np.array(resized.crop((left, top, left + side, top + side)))).float() / 255


@CASES
def test_tokens_of_a_picture_that_the_authors_resized(load_case, path):
    from comfyui_personalize.nodes.identity_encoding import identity_of

    case, encoder, vision = load_case(path)
    image = torch.stack([as_pil_resizes(picture, vision.image_size) for picture in pictures_of(case).numpy()])
    tokens = identity_of(encoder, vision, image, "one person each", 64).tokens
    case.check("tokens_cond", tokens.cond)
    case.check("tokens_uncond", tokens.uncond)


@CASES
def test_the_host_resizes_as_the_authors_do(load_case, path):
    """torch rounds once where PIL rounds twice: single numbers may be off by a level."""
    import comfy.clip_vision

    from comfyui_personalize.nodes.identity_encoding import identity_of

    case, encoder, vision = load_case(path)
    image = pictures_of(case).float() / 255
    seen = comfy.clip_vision.clip_preprocess(
        image, size=vision.image_size, mean=vision.image_mean, std=vision.image_std
    )
    error = (seen[:, :, 100] - case.expected["pixel_values_row"]).abs() * torch.tensor(vision.image_std)[:, None]
    assert error.max() < 1.5 * LEVEL and error.mean() < 0.5 * LEVEL
    tokens = identity_of(encoder, vision, image, "one person each", 64).tokens
    case.check("tokens_uncond", tokens.uncond)
    assert (tokens.cond - case.expected["tokens_cond"]).abs().mean() < 0.01 * tokens.cond.std()
