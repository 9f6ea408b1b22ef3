"""The trainer nodes of DVAR's methods in this process, and pictures with what they leave."""

import pytest
import torch

QUICK = {
    "steps": 2,
    "resolution": 64,
    "learning_rate": 1e-3,
    "batch_size": 1,
    "flip": False,
    "gradient_checkpointing": False,
    "preview_every": 0,
    "seed": 5,
}
ENCODERS = {"sd15": ("clip_l",), "sd21": ("clip_h",), "sdxl": ("clip_l", "clip_g")}
SOON = {"preset": "custom", "window": 3, "eps": 1.0, "every": 1, "eval_batch_size": 2}


@pytest.fixture
def train(comfy, tiny_checkpoint):
    """train(node, name, family, **settings): run a trainer node on one picture, as the host does it."""
    from comfyui_personalize.models.tokens import LearnedToken
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.dataset import Dataset

    picture = torch.rand(1, 40, 48, 3, generator=torch.Generator().manual_seed(0))
    tokens = (LearnedToken("<dog>", "dog", rows=2),)
    dataset = Dataset.from_tensors(_host.image_list([picture]), "a <dog>", tokens=tokens)

    def run(node, name, family="sd15", **settings):
        base = open_base(tiny_checkpoint(family), tokenizer=_host.tokenizer_folder())
        prepared = node.PREPARE_CLASS_CLONE(None)
        return prepared.execute(base=base, dataset=dataset, output_name=name, **QUICK | settings)

    return run


@pytest.fixture
def sampled(comfy, load_helper):
    """sampled(model, clip, prompt): latents of two steps."""

    def sample(model, clip, prompt):
        (positive,) = comfy.nodes.CLIPTextEncode().encode(clip, prompt)
        (negative,) = comfy.nodes.CLIPTextEncode().encode(clip, "")
        return load_helper("host/sampling.py").ksample(model, positive, negative, steps=2)

    return sample


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_textual_inversion_is_an_embedding_of_the_host(family, comfy, train, sampled):
    from comfyui_personalize.nodes.dvar import TrainTextualInversion
    from comfyui_personalize.nodes.load_dco import LoadLearnedTokens

    name = f"word_{family}"
    output = train(TrainTextualInversion, name, family)
    assert output.result[0] == f"{name}.safetensors" and output.result[3] == 2
    assert (comfy.base / "models" / "embeddings" / output.result[0]).is_file()
    assert not list((comfy.base / "models" / "loras").glob(f"{name}*"))
    model, clip, _ = comfy.load(family)
    reference = clip.clone()
    for encoder in ENCODERS[family]:
        getattr(reference.tokenizer, encoder).embedding_directory = [str(comfy.base / "models" / "embeddings")]
    stock = sampled(model, reference, f"a photo of embedding:{name}")
    assert not torch.equal(stock, sampled(model, clip, "a photo of dog dog"))
    taught = LoadLearnedTokens.execute(clip, output.result[0], "").result[0]
    assert torch.equal(sampled(model, taught, "a photo of <dog>"), stock)


def test_dvar_stops_a_textual_inversion(comfy, train):
    from comfyui_personalize.nodes.dvar import TrainTextualInversion
    from comfyui_personalize.nodes.stopping import StopDVAR

    defaults = {socket.id: socket.default for socket in StopDVAR.define_schema().inputs}
    rule = StopDVAR.execute(**defaults | SOON).result[0]
    steps, summary = train(TrainTextualInversion, "word_dvar", stopping=rule, steps=40).result[3:]
    assert 4 <= steps < 40 and "DVAR: over the last 3 steps the evaluation loss had" in summary


def test_a_dreambooth_lora_loads_with_its_word(comfy, train, sampled):
    from comfyui_personalize.nodes.dvar import TrainDreamBoothLoRA
    from comfyui_personalize.nodes.load_dco import LoadDCOLoRA

    output = train(TrainDreamBoothLoRA, "dreambooth", "sdxl", rank=2, learning_rate=1e-2)
    model, clip, _ = comfy.load("sdxl")
    loaded = LoadDCOLoRA.execute(model, output.result[0], 1.0, 1.0, "", clip).result
    picture = sampled(loaded[0], loaded[1], "a <dog>")
    assert picture.isfinite().all() and not torch.equal(picture, sampled(model, loaded[1], "a <dog>"))


def test_a_custom_diffusion_loads_as_patches_on_a_clone(comfy, train, sampled):
    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.custom_diffusion import LoadCustomDiffusion
    from comfyui_personalize.nodes.dvar import TrainCustomDiffusion

    output = train(TrainCustomDiffusion, "custom", "sdxl", learning_rate=1e-2, rescale_variants=0)
    model, clip, _ = comfy.load("sdxl")
    before = sampled(model, clip, "a dog")
    whole, taught, tokens = LoadCustomDiffusion.execute(model, output.result[0], 1.0, clip).result
    assert tokens == "<dog>"
    picture = sampled(whole, taught, "a <dog>")
    assert picture.isfinite().all() and not torch.equal(picture, sampled(model, taught, "a <dog>"))
    off = LoadCustomDiffusion.execute(model, output.result[0], 0.0).result[0]
    assert torch.equal(sampled(off, clip, "a dog"), before) and torch.equal(sampled(model, clip, "a dog"), before)
    with pytest.raises(IncompatibleModelError, match="does not fit this model; load the checkpoint family that it was"):
        LoadCustomDiffusion.execute(comfy.load("sd15")[0], output.result[0], 1.0)


@pytest.mark.parametrize("part", ["keys_values", "cross_attention"])
def test_whole_and_compressed_files_give_the_same_pictures(part, comfy, train, sampled):
    from comfyui_personalize.nodes.custom_diffusion import LoadCustomDiffusion
    from comfyui_personalize.nodes.dvar import TrainCustomDiffusion

    settings = {"learning_rate": 1e-2, "rescale_variants": 0, "save_precision": "fp32", "trained": part}
    settings |= {"class_pictures": 1, "class_prompt": "a dog", "class_steps": 1}
    model, clip, _ = comfy.load("sdxl")
    pictures = []
    for share in (1.0, 0.9999):
        name = train(TrainCustomDiffusion, f"{part}_{share}", "sdxl", kept_share=share, **settings).result[0]
        loaded = LoadCustomDiffusion.execute(model, name, 0.5, clip).result
        pictures.append(sampled(loaded[0], loaded[1], "a <dog>"))
    plain = sampled(model, loaded[1], "a <dog>")
    change = (pictures[0] - plain).abs().max()
    assert change > 0 and (pictures[0] - pictures[1]).abs().max() < 0.05 * change


def test_merged_concepts_load_as_one(comfy, train, sampled, tiny_checkpoint):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.custom_diffusion import LoadCustomDiffusion
    from comfyui_personalize.nodes.dvar import TrainCustomDiffusion
    from comfyui_personalize.nodes.merge_custom_diffusion import MergeCustomDiffusion
    from comfyui_personalize.trainers.base import open_base

    settings = {"learning_rate": 1e-2, "rescale_variants": 0, "class_word": "dog"}
    names = [train(TrainCustomDiffusion, f"part_{i}", seed=i, **settings).result[0] for i in range(2)]
    assert MergeCustomDiffusion.validate_inputs(custom_name=names[0], custom_name_2=names[1]) is True
    assert MergeCustomDiffusion.validate_inputs(custom_name_3="none.bin") is not True
    base = open_base(tiny_checkpoint("sd15"), tokenizer=_host.tokenizer_folder())
    node = MergeCustomDiffusion.PREPARE_CLASS_CLONE(None)
    with pytest.raises(ConfigError, match="there are 3 phrases for 2 files; write one line per file"):
        node.execute(base, *names, phrases="<dog> dog\n\n<cat> cat\n", output_name="both")
    merged, tokens = node.execute(base, *names, output_name="both", captions="a cat\na house by the sea").result
    assert (merged, tokens) == ("both.safetensors", "<dog>, <dog2>")
    model, clip, _ = comfy.load("sd15")
    loaded = LoadCustomDiffusion.execute(model, merged, 1.0, clip).result
    assert loaded[2] == tokens
    picture = sampled(loaded[0], loaded[1], "a <dog> and a <dog2>")
    assert picture.isfinite().all() and not torch.equal(picture, sampled(model, loaded[1], "a <dog> and a <dog2>"))


def test_settings_that_no_widget_has_are_refused(train):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.dvar import TrainTextualInversion

    with pytest.raises(ConfigError, match=r"unknown setting\(s\) rank of Train Textual Inversion; remove them"):
        train(TrainTextualInversion, "unknown", rank=2)
    assert TrainTextualInversion.validate_inputs(prompts="poem") is not True
    assert TrainTextualInversion.validate_inputs(output_name="../x") is not True
