"""One denoising step with Perfusion concepts, in pairs with the plain model."""

from dataclasses import dataclass

import torch
from pairs import Pair, time_pairs


@dataclass(frozen=True)
class Step:
    """A step with concepts and one without."""

    pair: Pair
    """Seconds of both."""
    rows: list[int]
    """Of each UNet call with concepts."""
    plain_rows: list[int]
    """Of each without."""


def measure(comfy, checkpoint, make_concept, counts: tuple[int, ...], side: int, rounds: int) -> dict[int, Step]:
    """Number of concepts -> what a step costs with them; what is made once for a run is made before."""
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    concepts = [
        GatedConcept(make_concept(model, clip, f"<{number}>", "cup", seed=number), 0.65, 0.15)
        for number in range(max(counts))
    ]
    encode = comfy.nodes.CLIPTextEncode().encode
    conds = encode(clip, "a cup on a table")[0], encode(clip, "")[0]
    latents = side // vae.downscale_ratio
    found: dict[int, Step] = {}
    for count in counts:
        edited = attach(model, concepts[:count], SigmaRange(0.0, 1.0))
        guiders = (_guider(comfy, one, conds) for one in (model, edited))
        found[count] = _step(comfy, *guiders, latents, rounds)
    return found


def _guider(comfy, model, conds):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(6.0)
    return guider


def _step(comfy, plain, edited, side: int, rounds: int) -> Step:
    found = []

    class Probe(comfy.samplers.KSAMPLER):
        """Times both guiders inside the run of the edited one, on the same latents."""

        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
            sigma, options = sigmas[:1], extra_args["model_options"]
            plain.inner_model, plain.conds = wrap.inner_model, wrap.conds
            x = wrap.inner_model.model_sampling.noise_scaling(sigma, noise, latent_image, True)
            # The plain model's wrappers, of which there are none, in the place of ours.
            transformer = {**options["transformer_options"], "wrappers": {}}
            bare = {**options, "transformer_options": transformer}

            def with_concepts():
                return wrap.predict_noise(x, sigma, options)

            def without():
                return plain.predict_noise(x, sigma, bare)

            rows: list[list[int]] = []
            unet = wrap.inner_model.diffusion_model
            hook = unet.register_forward_pre_hook(lambda _, arguments: rows[-1].append(len(arguments[0])))
            for work in (with_concepts, without):
                rows.append([])
                work()
            hook.remove()
            found.append(Step(time_pairs(with_concepts, without, rounds), *rows))
            return latent_image

    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0))
    edited.sample(noise, torch.zeros_like(noise), Probe(None), torch.tensor([5.0, 0.0]), seed=0)
    return found[0]
