"""Loading and reward guidance through a running server, wired both ways."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


def graph(family, *, lora, reward_scale=3.0, custom=False, seed=1, tokens=""):
    """Two conditionings under reward guidance; node "9" saves the picture."""
    prompts = {"3": "a <dog> playing saxophone", "4": "a dog playing saxophone", "5": "blurry"}
    nodes = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{family}.safetensors"}},
        "2": {
            "class_type": "PersonalizeLoadDCOLoRA",
            "inputs": {
                "model": ["1", 0],
                "clip": ["1", 1],
                "lora_name": lora,
                "strength_model": 1.0,
                "strength_clip": 1.0,
                "tokens": tokens,
            },
        },
        "6": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["7", 0], "vae": ["1", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "reward"}},
    }
    nodes |= {
        node: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["2", 1], "text": text}}
        for node, text in prompts.items()
    }
    guidance = {
        "model": ["2", 0],
        "personalized": ["3", 0],
        "base": ["4", 0],
        "negative": ["5", 0],
        "reward_scale": reward_scale,
        "rescale": 0.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    if not custom:
        sampling = {"seed": seed, "steps": 2, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
        inputs = {**guidance, **sampling, "latent_image": ["6", 0], "denoise": 1.0}
        return nodes | {"7": {"class_type": "PersonalizeKSamplerRewardGuidance", "inputs": inputs}}
    return nodes | {
        "10": {"class_type": "PersonalizeRewardGuider", "inputs": {**guidance, "text_scale": 7.0}},
        "11": {"class_type": "RandomNoise", "inputs": {"noise_seed": seed}},
        "12": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
        "13": {
            "class_type": "BasicScheduler",
            "inputs": {"model": ["2", 0], "scheduler": "normal", "steps": 2, "denoise": 1.0},
        },
        "7": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {
                "noise": ["11", 0],
                "guider": ["10", 0],
                "sampler": ["12", 0],
                "sigmas": ["13", 0],
                "latent_image": ["6", 0],
            },
        },
    }


@pytest.fixture
def lora(comfy_server):
    """lora(name, seed) writes a LoRA with a bundled token for the tiny SD1.5 into the server's folder."""

    def write(name, seed=0):
        generator = torch.Generator().manual_seed(seed)
        block = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{}_to_{}"
        tensors = {"bundle_emb.dog.clip_l": torch.randn(2, 64, generator=generator) * 0.1}
        for part, inputs in (((1, "q"), 32), ((1, "v"), 32), ((2, "k"), 64), ((2, "v"), 64)):
            tensors[f"{block.format(*part)}.lora_down.weight"] = torch.randn(4, inputs, generator=generator)
            tensors[f"{block.format(*part)}.lora_up.weight"] = torch.randn(32, 4, generator=generator) * 0.1
        folder = comfy_server.base / "models" / "loras"
        folder.mkdir(parents=True, exist_ok=True)
        tokens = json.dumps([{"trigger": "<dog>", "initializer": "dog", "rows": 2}])
        save_file(tensors, folder / name, {"personalize.tokens": tokens})
        return name

    return write


def picture(client, workflow):
    run = client.run(workflow)
    assert run.status == "success", run.error
    (image,) = client.images(run, node="9")
    return np.asarray(image.convert("RGB")).astype(int), run


def test_both_wirings_give_one_picture_and_the_reward_changes_it(client, lora):
    name = lora("http_dog.safetensors")
    simple, run = picture(client, graph("sd15", lora=name))
    assert run.progress("7")[-1] == (2, 2) and run.previews
    custom, _ = picture(client, graph("sd15", lora=name, custom=True))
    assert np.array_equal(simple, custom)
    without, _ = picture(client, graph("sd15", lora=name, reward_scale=0.0))
    assert not np.array_equal(simple, without)


def test_a_lora_trained_again_under_its_name_is_loaded_again(client, lora):
    name = lora("http_again.safetensors")
    first, _ = picture(client, graph("sd15", lora=name))
    again = client.run(graph("sd15", lora=name))
    assert {"2", "7"} <= again.cached_nodes
    lora(name, seed=1)
    second, run = picture(client, graph("sd15", lora=name))
    assert "2" not in run.cached_nodes
    assert not np.array_equal(first, second)


def test_a_lora_for_another_model_ends_the_run_with_one_sentence(client, lora):
    run = client.run(graph("sdxl", lora=lora("http_wrong.safetensors")))
    assert run.status == "error"
    assert "http_wrong.safetensors looks like a LoRA for" in run.error["exception_message"]
    assert client.run(graph("sd15", lora="http_wrong.safetensors", seed=9)).status == "success"


def test_wrong_values_are_refused_before_queueing(client, lora, load_helper):
    name = lora("http_bounds.safetensors")
    for node, changes, text in (
        ("7", {"reward_scale": -1.0}, "reward_scale"),
        ("7", {"sampler_name": "absent"}, "no sampler named 'absent'"),
        ("7", {"scheduler": "absent"}, "no scheduler named 'absent'"),
        ("2", {"lora_name": "absent.safetensors"}, "no LoRA named 'absent.safetensors'"),
    ):
        workflow = graph("sd15", lora=name)
        workflow[node]["inputs"] |= changes
        with pytest.raises(load_helper("host/client.py").Rejected) as refusal:
            client.post(workflow)
        assert any(text in message for message in refusal.value.messages), refusal.value.messages
