"""Random LoRAs for the host's tiny models, and sampling with them; shared by the host tests."""

import math

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from torch import nn

NORMS = (nn.GroupNorm, nn.LayerNorm)


def layers(model, kinds=(nn.Linear, nn.Conv2d), every=3):
    """Every third leaf module of the UNet, (dotted name, module): different in kind, size and depth."""
    found = [item for item in model.model.diffusion_model.named_modules() if isinstance(item[1], kinds)]
    return found[::every]


def stem(name):
    """Name of a UNet module in a kohya file that keeps the checkpoint's own names."""
    return "lora_unet_" + name.replace(".", "_")


def random_lora(model, kind="lora", *, seed=0, every=3, gain=1.0, rank=4):
    """Tensors of a random LoRA of any kind that the host reads, with a visible effect."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return torch.randn(shape, generator=generator) * std

    tensors = {}
    targets = NORMS if kind in ("norm", "norm_diff") else (nn.Linear, nn.Conv2d)
    for name, module in layers(model, targets, every):
        weight, key = module.weight, stem(name)
        out, inputs = weight.shape[0], weight[0].numel()
        std = 0.3 * gain / math.sqrt(inputs)
        if kind in ("lora", "dora"):
            down = normal(rank, *weight.shape[1:], std=1 / math.sqrt(rank))
            tensors[f"{key}.lora_down.weight"] = down
            tensors[f"{key}.lora_up.weight"] = normal(out, rank, *([1, 1] if weight.ndim == 4 else []), std=std)
            tensors[f"{key}.alpha"] = torch.tensor(float(rank) / 2)
            if kind == "dora":
                tensors[f"{key}.dora_scale"] = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1)) * 1.1
        elif kind == "tucker":
            if weight.ndim == 4:
                tensors[f"{key}.lora_down.weight"] = normal(rank, weight.shape[1], 1, 1, std=1 / math.sqrt(rank))
                tensors[f"{key}.lora_mid.weight"] = normal(rank, rank, *weight.shape[2:], std=1 / math.sqrt(rank))
                tensors[f"{key}.lora_up.weight"] = normal(out, rank, 1, 1, std=std)
                tensors[f"{key}.alpha"] = torch.tensor(3.0)
        elif kind == "loha":
            for half, scale in (("w1", 1.0), ("w2", std)):
                tensors[f"{key}.hada_{half}_a"] = normal(out, rank, std=scale / math.sqrt(rank))
                tensors[f"{key}.hada_{half}_b"] = normal(rank, inputs)
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
        elif kind == "lokr":
            if out % 4 == 0 and weight.shape[1] % 4 == 0:
                tensors[f"{key}.lokr_w1"] = normal(4, 4, std=std)
                tensors[f"{key}.lokr_w2"] = normal(out // 4, weight.shape[1] // 4, *weight.shape[2:])
        elif kind == "oft":
            if out % 4 == 0:
                tensors[f"{key}.oft_blocks"] = normal(out // 4, 4, 4, std=0.05)
        elif kind == "boft":
            if out % 8 == 0:
                tensors[f"{key}.oft_blocks"] = normal(2, out // 4, 4, 4, std=0.05)
                tensors[f"{key}.alpha"] = torch.tensor(1.0)
        elif kind == "glora":
            if weight.ndim == 2 and out == inputs:
                for part in ("a1", "a2", "b1", "b2"):
                    tensors[f"{key}.{part}.weight"] = normal(
                        *((out, rank) if part in "a2 b2" else (rank, out)), std=0.1
                    )
        elif kind in ("diff", "norm_diff"):
            tensors[f"{key}.diff"] = normal(*weight.shape, std=std if kind == "diff" else 0.1)
            if module.bias is not None:
                tensors[f"{key}.diff_b"] = normal(out, std=0.05)
        elif kind == "set":
            tensors[f"{key}.set_weight"] = weight.detach() + normal(*weight.shape, std=std)
        elif kind == "norm":
            tensors[f"{key}.w_norm"] = normal(*weight.shape, std=0.1)
            tensors[f"{key}.b_norm"] = normal(*weight.shape, std=0.1)
        elif kind == "lora_and_bias":
            tensors[f"{key}.lora_down.weight"] = normal(rank, *weight.shape[1:], std=1 / math.sqrt(rank))
            tensors[f"{key}.lora_up.weight"] = normal(out, rank, *([1, 1] if weight.ndim == 4 else []), std=std)
            if module.bias is not None:
                tensors[f"{key}.diff_b"] = normal(out, std=0.05)
    return tensors


def with_stock_loader(model, tensors, strength=1.0):
    """The model as the host's own LoRA loader patches it."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def with_switchable(model, tensors, strength=1.0, name="random.safetensors"):
    """The model under a switchable LoRA of ours."""
    from comfyui_personalize.nodes.lora_layers import match_lora
    from comfyui_personalize.nodes.switchable_lora import SwitchableLora, attach

    return attach(model, SwitchableLora(name, match_lora(name, tensors, {}, model).unet, strength))


def latent(batch=1, height=8, width=8, seed=5):
    """A LATENT with content, so that denoise below 1 and masks have something to keep."""
    return {"samples": torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))}


def ksample(model, positive, negative, *, cfg=7.0, steps=3, sampler="euler", seed=1, start=None):
    """Latents from the host's KSampler."""
    start = start or {"samples": torch.zeros(1, 4, 8, 8)}
    noise = comfy.sample.prepare_noise(start["samples"], seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "normal", positive, negative, start["samples"],
        noise_mask=start.get("noise_mask"), disable_pbar=True, seed=seed,
    )  # fmt: skip


def guide(guider, *, steps=3, sampler="euler", seed=1, start=None, sigmas=None):
    """Latents from any guider, the way SamplerCustomAdvanced runs it."""
    start = start or {"samples": torch.zeros(1, 4, 8, 8)}
    noise = comfy.sample.prepare_noise(start["samples"], seed)
    if sigmas is None:
        model = guider.model_patcher
        sigmas = comfy.samplers.KSampler(model, steps, model.load_device, sampler, "normal").sigmas
    return guider.sample(
        noise, start["samples"], comfy.samplers.sampler_object(sampler), sigmas,
        denoise_mask=start.get("noise_mask"), disable_pbar=True, seed=seed,
    )  # fmt: skip


class CountRows:
    """Rows of every UNet forward while it is entered."""

    def __init__(self, model):
        self.unet = model.model.diffusion_model
        self.rows = []

    def __enter__(self):
        self._forward = self.unet._forward
        self.unet._forward = lambda x, *args, **kwargs: (
            self.rows.append(x.shape[0]),
            self._forward(x, *args, **kwargs),
        )[1]
        return self.rows

    def __exit__(self, *exception):
        del self.unet._forward


def relative(got, expected):
    """Largest difference, relative to the largest expected magnitude."""
    return float((got - expected).abs().max() / expected.abs().max())
