"""Prompts of a batch, one per picture."""

import pytest
import torch


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_every_picture_gets_its_own_prompt(comfy, tools, family):
    from comfyui_personalize.nodes.prompts import PromptBatch

    model, clip, _ = comfy.load(family)
    long = "a red circle " * 40  # two blocks of 77 tokens
    prompts = ["a red circle at night", long.strip(), "two blue stars"]
    batch, count = PromptBatch.execute(clip, "\n\n".join(prompts) + "\n").result
    assert count == 3 and batch[0][0].shape[:2] == (3, 154)
    encode = comfy.nodes.CLIPTextEncode().encode
    negative = encode(clip, "blurry")[0]
    start = {"samples": torch.zeros(3, 4, 8, 8)}
    together = tools.ksample(model, batch, negative, start=start)
    for row, prompt in enumerate(prompts):
        alone = tools.ksample(model, encode(clip, prompt)[0], negative, start=start)
        assert tools.relative(together[row], alone[row]) < 1e-4


def test_no_prompt_is_refused(comfy):
    from comfyui_personalize.models.errors import ConfigError
    from comfyui_personalize.nodes.prompts import PromptBatch

    with pytest.raises(ConfigError, match="write a prompt on each line"):
        PromptBatch.execute(comfy.load("sd15")[1], " \n\n")
