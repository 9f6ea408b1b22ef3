"""A reward guided denoising step in the host: one UNet call of three rows, against the authors' two calls."""

import statistics

import torch
from pairs import Pair, time_pairs


def build(comfy, extension, checkpoint, lora_name: str):
    """A loaded tiny model with a switchable LoRA, and conditionings; ``comfy`` is the host's namespace."""
    model, clip, _vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    loaded = extension.LoadDCOLoRA.execute(model, lora_name, 1.0, 1.0, "", clip).result
    encode = comfy.nodes.CLIPTextEncode().encode
    prompts = ("a <dog> on the beach", "a dog on the beach", "")
    return loaded[0], [encode(loaded[1], prompt)[0] for prompt in prompts]


def measure(comfy, extension, checkpoint, lora_name: str, side: int, rounds: int) -> dict:
    """Seconds of one guided step both ways, and the UNet's calls and rows per step."""
    from importlib import import_module

    guidance = import_module(f"{extension.__name__}.reward_guidance")
    guiding = import_module(f"{extension.__name__}.guiding")
    reward_guidance = import_module(f"{extension.__name__.rpartition('.')[0]}.models.dco").reward_guidance
    model, (personalized, base, negative) = build(comfy, extension, checkpoint, lora_name)
    conds = {"personalized": personalized, "base": base, "negative": negative}
    guider = guidance.RewardGuider(model, **conds, text_scale=7.5, reward_scale=3.0)
    noise = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
    found: dict = {}

    def compare(inner, x, sigma, options) -> Pair:
        rows: list[int] = []
        handle = inner.diffusion_model.register_forward_pre_hook(
            lambda _module, arguments: rows.append(len(arguments[0]))
        )

        def one_call():
            return guider.predict_noise(x, sigma, options)

        def two_calls():
            calc = comfy.samplers.calc_cond_batch
            plain = calc(inner, [guider._tagged("negative"), guider._tagged("base")], x, sigma, options)
            learned = calc(inner, [guider._tagged("positive")], x, sigma, options)[0]
            return reward_guidance(plain[0], plain[1], [learned], text_scale=7.5, reward_scales=(3.0,))

        for name, work in (("ours", one_call), ("authors", two_calls)):
            rows.clear()
            found[f"{name}_output"] = work()
            found[f"{name}_rows"] = list(rows)
        pair = time_pairs(one_call, two_calls, rounds)
        handle.remove()
        return pair

    class Probe(comfy.samplers.KSAMPLER):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
            inner, sigma = wrap.inner_model, sigmas[:1]
            x = inner.model_sampling.noise_scaling(sigma, noise, latent_image, True)
            found["pair"] = compare(inner, x, sigma, extra_args["model_options"])
            return latent_image

    sigmas = guiding.scheduled_sigmas(model, 20, "euler", "normal", 1.0)
    guider.sample(noise, torch.zeros_like(noise), Probe(None), sigmas, seed=0)
    ours, theirs = found.pop("ours_output"), found.pop("authors_output")
    found["largest_difference"] = float((ours - theirs).abs().max() / statistics.fmean([float(ours.abs().max())]))
    return found
