"""A trained Perfusion concept and a DCO LoRA with a word of its own, in one sampling."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_personalize.models.tokens import LearnedToken

DOG = json.dumps([{"trigger": "<dog>", "initializer": "dog", "rows": 1}])


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def both(comfy, tools, tiny_checkpoint, load_helper):
    """both(family) -> a Workplace with a concept <cup> and a LoRA with <dog> in the host's folders."""

    class Workplace:
        def __init__(self, family):
            self.model, self.clip, _ = comfy.load(family)
            concept = comfy.base / "models" / "perfusion_concepts" / f"cup_{family}.safetensors"
            write = load_helper("tiny/perfusion.py").write_random_concept
            with torch.inference_mode(False), torch.enable_grad():
                write(concept, tiny_checkpoint(family), LearnedToken("<cup>", "cup"))
            self.concept = concept.name
            keys = load_helper("tiny/checkpoints.py").FAMILIES[family].text_encoders
            generator = torch.Generator().manual_seed(3)
            rows = {f"bundle_emb.dog.{one.key}": torch.randn(1, one.width, generator=generator) * 0.1 for one in keys}
            self.lora = f"dog_{family}.safetensors"
            folder = comfy.base / "models" / "loras"
            folder.mkdir(parents=True, exist_ok=True)
            tensors = tools.random_lora(self.model, every=1, gain=0.5) | rows
            save_file(tensors, folder / self.lora, {"personalize.tokens": DOG})

        def with_concept(self, model, clip):
            from comfyui_personalize.nodes.perfusion import ApplyPerfusion
            from comfyui_personalize.nodes.perfusion_concepts import LoadPerfusionConcept

            self.concepts = LoadPerfusionConcept.execute(self.concept, 0.65, 0.15, True).result[0]
            return ApplyPerfusion.execute(model, clip, self.concepts).result

        def with_lora(self, model, clip):
            from comfyui_personalize.nodes.load_dco import LoadDCOLoRA

            return LoadDCOLoRA.execute(model, self.lora, 1.0, 1.0, "", clip).args[:2]

        def loaded(self, *loaders):
            model, clip = self.model, self.clip
            for loader in loaders:
                model, clip = loader(model, clip)
            return model, clip

    return Workplace


def encode(comfy, clip, prompt):
    return comfy.nodes.CLIPTextEncode().encode(clip, prompt)[0]


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_they_act_together_whichever_is_loaded_first(comfy, tools, both, family):
    one = both(family)
    model, clip = one.loaded(one.with_lora, one.with_concept)
    prompts = [encode(comfy, clip, text) for text in ("a <dog> beside a <cup>", "blurry")]
    together = tools.ksample(model, *prompts)
    other_model, other_clip = one.loaded(one.with_concept, one.with_lora)
    assert torch.equal(encode(comfy, other_clip, "a <dog> beside a <cup>")[0][0], prompts[0][0][0])
    assert tools.relative(tools.ksample(other_model, *prompts), together) < 1e-5
    for alone in (one.with_lora, one.with_concept):
        assert tools.relative(tools.ksample(one.loaded(alone)[0], *prompts), together) > 0.01


def test_reward_guidance_samples_with_a_concept(comfy, tools, both):
    """Reward guidance turns the LoRA off for its base rows; the concept stays on all of them."""
    from comfyui_personalize.nodes.reward_guidance import RewardGuider

    one = both("sd15")
    model, clip = one.loaded(one.with_lora, one.with_concept)
    words = {"personalized": "a <dog> beside a <cup>", "base": "a dog beside a <cup>", "negative": "blurry"}
    conds = {name: encode(comfy, clip, text) for name, text in words.items()}

    def drawn(model, scale):
        return tools.guide(RewardGuider(model, text_scale=3.0, reward_scale=scale, **conds))

    only_concept = one.loaded(one.with_concept)[0]
    base = tools.ksample(only_concept, conds["base"], conds["negative"], cfg=3.0)
    assert tools.relative(drawn(model, 0.0), base) < 1e-4
    assert tools.relative(drawn(model, 2.0), base) > 0.01
    assert tools.relative(drawn(one.loaded(one.with_lora)[0], 2.0), drawn(model, 2.0)) > 0.01
