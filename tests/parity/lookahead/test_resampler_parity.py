"""Identity tokens from CLIP-Vision's hidden states, and from the picture itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from comfyui_personalize.models.lookahead import encode_identity

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.golden("lookahead", "01_resampler")
def test_tokens_of_hidden_states(case, resampler):
    case.check("cond", resampler(case.inputs["clip_cond"]))
    case.check("uncond", resampler(case.inputs["clip_uncond"]))


@pytest.mark.golden("lookahead", "weights_unet")
def test_the_shared_weights_have_the_recorded_sizes(case, resampler):
    assert resampler.latents.shape[1] == case.config["num_tokens"]
    assert resampler.proj_out.out_features == case.config["cross_attention_dim"]
    assert resampler.picture_dim == case.config["clip"]["hidden_size"]


@pytest.fixture
def clip_vision(shared):
    """CLIP-Vision with the shared weights; both spellings of its module path are accepted."""
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shared.config["clip"]))
    names = model.state_dict().keys()
    given = {key.removeprefix("image_encoder."): value for key, value in shared.weights.items()}
    given = {key: value for key, value in given.items() if key in names}
    assert given.keys() == names - {name for name in names if name.endswith("position_ids")}
    model.load_state_dict(given, strict=False)
    return model.eval().requires_grad_(False)


def pixels(picture: np.ndarray, size: int) -> torch.Tensor:
    """One uint8 picture as CLIP wants it: shortest edge bicubic to ``size``, centre crop, normalised."""
    height, width = (size * edge // min(picture.shape[:2]) for edge in picture.shape[:2])
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    values = torch.from_numpy(np.array(resized.crop((left, top, left + size, top + size)))).float() / 255
    return ((values - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)).permute(2, 0, 1)


@pytest.mark.golden("lookahead", "01b_adapter_from_image")
def test_tokens_of_a_picture(case, resampler, clip_vision):
    levels = (255 * ((case.inputs["image"].clamp(-1, 1) + 1) / 2)).round().to(torch.uint8).permute(0, 2, 3, 1)
    batch = torch.stack([pixels(picture, case.config["clip"]["image_size"]) for picture in levels.numpy()])
    states = []

    def hidden_states(pixel_values):
        states.append(clip_vision(pixel_values, output_hidden_states=True).hidden_states[-2])
        return states[-1]

    identity = encode_identity(resampler, hidden_states, batch)
    (seen,) = states

    case.check("pil_uint8", levels)
    case.check("pixel_values_row", batch[:, :, 100])
    case.check("pixel_values_mean_std", torch.stack([batch.mean((2, 3)), batch.std((2, 3))]))
    case.check("clip_cond", seen[:-1])
    case.check("clip_uncond", seen[-1:].expand(len(batch), -1, -1))
    case.check("tokens_cond", identity.cond)
    case.check("tokens_uncond", identity.uncond)
