"""The small world's image encoder in the host's own CLIP-Vision nodes."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "world"))


@pytest.fixture(scope="module")
def pair(host_modules, tmp_path_factory):
    """A pair with random weights, as its file holds it; the file lies in the host's folder."""
    import clip_pair

    folder = Path(host_modules.folder_paths.get_folder_paths("clip_vision")[0])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    clip_pair.write_pair(folder / "tiny_clip.safetensors", clip_pair.build_pair(), {})
    return clip_pair.load_pair(folder / "tiny_clip.safetensors")


@pytest.fixture(scope="module")
def pictures():
    """Two drawn scenes, (2, 64, 64, 3) in 0..1 as the host holds pictures."""
    from dataset import draw_bytes, in_unit_range
    from generator import random_scene

    drawn = torch.stack([draw_bytes(random_scene(random.Random(seed))) for seed in (1, 2)])
    return in_unit_range(drawn).permute(0, 2, 3, 1).contiguous()


@pytest.fixture
def encode(comfy, pair):
    """Pictures through the host's loader and encoder, as a workflow wires them."""

    def encode(pictures):
        (encoder,) = comfy.nodes.CLIPVisionLoader().load_clip("tiny_clip.safetensors")
        return comfy.nodes.CLIPVisionEncode().encode(encoder, pictures, "center")[0]

    return encode


def in_transformers(pair, pictures):
    model, preprocess = pair
    pixels = preprocess(pictures.permute(0, 3, 1, 2))
    hidden = model.vision_model(pixel_values=pixels, output_hidden_states=True)
    return hidden.hidden_states, model.visual_projection(hidden.pooler_output)


def test_the_host_sees_what_transformers_sees(pair, pictures, encode):
    found = encode(pictures)
    hidden, embeds = in_transformers(pair, pictures)
    assert embeds.std() > 0.1, "an encoder that sees nothing would agree with anything"
    torch.testing.assert_close(found["image_embeds"], embeds, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["last_hidden_state"], hidden[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["penultimate_hidden_states"], hidden[-2], rtol=1e-4, atol=1e-4)
    assert found["penultimate_hidden_states"].shape == (2, 65, 64)
    assert (hidden[-2] - hidden[-1]).abs().max() > 1e-2


def test_larger_pictures_are_cropped_in_the_middle(pair, pictures, encode):
    wide = torch.nn.functional.interpolate(pictures.permute(0, 3, 1, 2), (96, 160), mode="bilinear").permute(0, 2, 3, 1)
    found = encode(wide)["image_embeds"]
    # The host rounds to whole bytes after it has scaled.
    torch.testing.assert_close(found, in_transformers(pair, wide)[1], rtol=0, atol=2e-2)
    assert (found - in_transformers(pair, pictures)[1]).abs().max() > 5e-2


def test_a_file_of_unknown_sizes_stays_unknown(comfy, pair):
    from safetensors.torch import save_file

    sizes = {"vision_model.embeddings.patch_embedding.weight": torch.zeros(32, 3, 8, 8)}
    save_file(sizes, comfy.folder_paths.get_folder_paths("clip_vision")[0] + "/unknown.safetensors")
    with pytest.raises(RuntimeError, match="clip vision file is invalid"):
        comfy.nodes.CLIPVisionLoader().load_clip("unknown.safetensors")


def test_an_incomplete_file_is_refused(comfy, pair):
    from safetensors.torch import save_file

    weights = {name: weight for name, weight in pair[0].state_dict().items() if "layers.3" not in name}
    save_file(weights, comfy.folder_paths.get_folder_paths("clip_vision")[0] + "/incomplete.safetensors")
    with pytest.raises(ValueError, match="without vision_model.encoder.layers.3"):
        comfy.nodes.CLIPVisionLoader().load_clip("incomplete.safetensors")
