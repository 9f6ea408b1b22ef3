"""The small world's models in the host: sampled from together as alone, and personalized by LoRAs trained on them.

That they load whole and predict what the training base predicts is tested beside the tiny ones, in test_stock.py
and test_base_matches_host.py.
"""

import logging
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

MODELS = ("world_sd15", "world_sdxl")


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture(scope="module")
def evaluate(host_modules, load_helper):
    """tests/world/evaluate.py; the host's folder stays first on the path."""
    before = list(sys.path)
    module = load_helper("world/evaluate.py")
    sys.path[:] = before + [folder for folder in sys.path if folder not in before]
    return module


@pytest.fixture(params=MODELS)
def trained(request, comfy, checkpoint):
    """A base, its UNet with a LoRA on every attention layer, and the LoRA's file in the host's folder."""
    from comfyui_personalize.trainers.adapters import ATTENTION, TEXT_ATTENTION, add_lora, read_lora
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.config import TrainConfig
    from comfyui_personalize.trainers.output import OutputPlace, save_personalization

    base = open_base(checkpoint(request.param))
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        unet, deltas = base.load_unet(), {}
        parts = [("unet", unet, ATTENTION)]
        for index, encoder in enumerate(base.load_text_encoders()):
            parts.append(("text_encoder" if index == 0 else f"text_encoder_{index + 1}", encoder, TEXT_ATTENTION))
        for root, module, targets in parts:
            for name, parameter in add_lora(module, 4, targets, generator).items():
                if ".lora_B." in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            deltas |= read_lora(module, root)
    models = comfy.base / "models"
    place = OutputPlace(f"on_{request.param}", models / "loras", models / "embeddings", comfy.base / "runs", True)
    config = TrainConfig(save_precision="fp32")
    about = {"family": base.family, "layers_per_block": base.layers_per_block, "method": "dco", "config": config}
    (path,) = save_personalization(place, deltas, {}, [], **about, overwrite=True)
    return request.param, base, unet, deltas, path


def predictions(comfy, base, unet, patcher):
    """The same noisy latents through a UNet of ours and the one of a MODEL, patched as it is."""
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([900, 40])
    context = torch.randn(2, 77, unet.config.cross_attention_dim, generator=generator)
    vector, added = None, None
    if base.family.size_conditioning:
        pooled = torch.randn(2, base.text_encoders[-1].config["projection_dim"], generator=generator)
        sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
        vector = torch.cat([patcher.model.encode_adm(pooled_output=pooled[i : i + 1], **sizes) for i in range(2)])
        added = {"text_embeds": pooled, "time_ids": torch.tensor([list(sizes.values())] * 2, dtype=torch.float32)}
    comfy.model_management.load_models_gpu([patcher], force_patch_weights=True)
    theirs = patcher.model.diffusion_model(noisy, timesteps, context=context, y=vector)
    return unet(noisy, timesteps, context, added_cond_kwargs=added, return_dict=False)[0], theirs


def test_the_stock_loader_uses_every_layer_of_a_trained_lora(comfy, tools, trained, caplog):
    name, base, unet, deltas, path = trained
    model, clip, _ = comfy.load(name)
    with caplog.at_level(logging.WARNING):
        patched, patched_clip = comfy.nodes.LoraLoader().load_lora(model, clip, path.name, 1.0, 1.0)
    assert not [text for text in caplog.messages if "not loaded" in text]
    of_unet = [key for key in deltas if key.startswith("unet.")]
    assert len(patched.patches) == len(of_unet)
    assert len(patched_clip.patcher.patches) == len(deltas) - len(of_unet)
    with_lora, theirs = predictions(comfy, base, unet, patched)
    assert tools.relative(theirs, with_lora) < 1e-4
    plain, _ = predictions(comfy, base, base.load_unet(), patched)
    assert tools.relative(plain, with_lora) > 1e-2


def test_our_loader_uses_every_layer_and_equals_the_stock_one(comfy, tools, trained):
    from comfyui_personalize.nodes.load_dco import LoadDCOLoRA
    from comfyui_personalize.nodes.switchable_lora import chain

    name, _, _, deltas, path = trained
    model, clip, _ = comfy.load(name)
    ours, our_clip, _ = LoadDCOLoRA.execute(model, path.name, 0.8, 0.6, "", clip).args
    stock, stock_clip = comfy.nodes.LoraLoader().load_lora(model, clip, path.name, 0.8, 0.6)
    assert len(chain(ours)[0].layers) == len([key for key in deltas if key.startswith("unet.")])
    positive, expected = (comfy.nodes.CLIPTextEncode().encode(part, "a red ring")[0] for part in (our_clip, stock_clip))
    assert torch.equal(positive[0][0], expected[0][0])
    negative = comfy.nodes.CLIPTextEncode().encode(clip, "")[0]
    expected = tools.ksample(stock, positive, negative, steps=2, cfg=3.0)
    assert tools.relative(tools.ksample(ours, positive, negative, steps=2, cfg=3.0), expected) < 1e-4
    assert tools.relative(tools.ksample(model, positive, negative, steps=2, cfg=3.0), expected) > 1e-3


def test_a_lora_goes_to_diffusers_layout_and_back(comfy, trained):
    from comfyui_personalize.nodes.export_lora import LAYOUTS, ExportLoRA

    name, _, _, deltas, path = trained
    ExportLoRA.execute(path.name, LAYOUTS[1], "auto", f"{name}_as_diffusers", True)
    exported = load_file(path.with_name(f"{name}_as_diffusers.safetensors"))
    assert exported.keys() == {f"{key}.lora_{part}.weight" for key in deltas for part in "AB"}
    ExportLoRA.execute(f"{name}_as_diffusers.safetensors", LAYOUTS[0], "auto", f"{name}_and_back", True)
    original, back = load_file(path), load_file(path.with_name(f"{name}_and_back.safetensors"))
    assert original.keys() == back.keys()
    assert all(original[key].equal(back[key]) for key in original)


@pytest.mark.parametrize("name", MODELS)
def test_pictures_sampled_together_are_those_sampled_alone(comfy, evaluate, checkpoint, name, monkeypatch):
    model = evaluate.HostModel(comfy, checkpoint(name))
    captions = ["a big red ring in the middle in the snow", "a blue star on the left at night in neon style"]
    together = model.sample(captions, steps=4)
    monkeypatch.setattr(evaluate, "BATCH", 1)
    alone = model.sample(captions, steps=4)
    torch.testing.assert_close(alone, together, rtol=0, atol=2e-3)
    assert (together[0] - together[1]).abs().max() > 0.05
    assert not torch.equal(model.sample(captions[::-1], steps=4), together.flip(0))  # noise goes by number


def test_an_evaluation_reads_drawn_rebuilt_and_sampled_pictures(comfy, evaluate, checkpoint, tmp_path, monkeypatch):
    from scorer import HEADS, Scorer, ScorerNetwork, compare

    torch.manual_seed(0)
    scorer = Scorer(ScorerNetwork(), dict.fromkeys(HEADS, 1.0))
    monkeypatch.setattr(evaluate, "STEPS", 2)
    result = evaluate.evaluate(
        checkpoint("world_sd15"), count=10, scorer=scorer, sheet=tmp_path / "sheet.jpg", host=comfy
    )
    rows = {(row["of"], row["right"]): row for row in result["rows"]}
    counts = {of: row["count"] for (of, _), row in rows.items()}
    assert counts == {"one or two shapes": 10, "one shape": 5, "two shapes": 5, "a creature": 2, "a person": 2}
    scenes = evaluate.unseen_scenes("shape", 5)
    right = compare(scorer.read(evaluate.drawn(scenes)), scenes)
    assert rows["one shape", "colour"]["drawn"] == pytest.approx(right["colour"].float().mean().item(), abs=1e-4)
    assert result["settings"]["captions"] == 10 and result["psnr"] > 0
    assert len(evaluate.evaluation_table(result)) == 4 + len(rows)
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.width > 8 * 128
    assert (tmp_path / "sheet.jpg").stat().st_size <= 200_000
