"""One denoising step with Perfusion concepts, in pairs with the plain model."""

import time
from dataclasses import dataclass
from functools import partial
from unittest import mock

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
    hooks: float
    """Share of a step with concepts that is spent in their hooks, which the ratio of two noisy times hides."""


def measure(comfy, checkpoint, make_concept, counts: tuple[int, ...], side: int, rounds: int) -> dict[int, Step]:
    """Number of concepts -> what a step costs with them; what is made once for a run is made before."""
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[:3]
    plain = comfy.sd.load_checkpoint_guess_config(str(checkpoint))[0]  # which no run puts hooks on
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
        guiders = [_guider(comfy, one, conds) for one in (plain, edited)]
        noise = torch.randn(1, 4, latents, latents, generator=torch.Generator().manual_seed(0))
        found[count] = Step(*_compared(comfy, *guiders, noise, rounds), _in_hooks(comfy, guiders[1], noise, rounds))
    return found


def _guider(comfy, model, conds):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(6.0)
    return guider


def _compared(comfy, plain, edited, noise, rounds: int) -> tuple[Pair, list[int], list[int]]:
    """Seconds and rows of a step with concepts and of one without, both within a run."""
    found = []

    def compare(without, bare, with_concepts, unet):
        rows: list[list[int]] = []
        for network, work in ((unet, with_concepts), (bare, without)):
            rows.append([])
            hook = network.register_forward_pre_hook(lambda _, arguments: rows[-1].append(len(arguments[0])))
            work()
            hook.remove()
        found.extend((time_pairs(with_concepts, without, rounds), *rows))

    _within_a_run(comfy, plain, noise, lambda *bare: _within_a_run(comfy, edited, noise, partial(compare, *bare)))
    return tuple(found)


def _in_hooks(comfy, edited, noise, rounds: int) -> float:
    """Share of the steps of a run that is spent in the concepts' hooks."""
    from comfyui_personalize.nodes import rank_one_edits

    make, spent, shares = rank_one_edits._hooks, [], []

    def timed(hook):
        def run(*args):
            started = time.perf_counter()
            answer = hook(*args)
            spent.append(time.perf_counter() - started)
            return answer

        return run

    def measure(step, _unet):
        step()  # makes what the others find made
        spent.clear()
        started = time.perf_counter()
        for _ in range(rounds):
            step()
        shares.append(sum(spent) / (time.perf_counter() - started))

    with mock.patch.object(rank_one_edits, "_hooks", lambda *args: tuple(map(timed, make(*args)))):
        _within_a_run(comfy, edited, noise, measure)
    return shares[0]


def _within_a_run(comfy, guider, noise, act) -> None:
    """Call ``act(step, unet)`` in a sampling run of the guider; ``step()`` is one of its denoising steps."""

    class Probe(comfy.samplers.KSAMPLER):
        def sample(self, wrap, sigmas, extra_args, callback, noise, latent_image=None, *_more):
            x = wrap.inner_model.model_sampling.noise_scaling(sigmas[:1], noise, latent_image, True)
            act(
                lambda: wrap.predict_noise(x, sigmas[:1], extra_args["model_options"]), wrap.inner_model.diffusion_model
            )
            return latent_image

    guider.sample(noise, torch.zeros_like(noise), Probe(None), torch.tensor([5.0, 0.0]), seed=0)
