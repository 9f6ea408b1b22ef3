"""What our guiders share: more terms than the text's, under the rules of the host and of other nodes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..models.guidance import rescale_guidance, text_guidance

Conditioning = list[tuple[Tensor, dict[str, Any]]]
"""The host's CONDITIONING."""
Entries = list[dict[str, Any]]
"""A conditioning as guiders keep it while they sample."""


def share_control(source: Conditioning, target: Conditioning) -> Conditioning:
    """``target`` under the ControlNets of ``source`` when it has none of its own.

    Without this, what the two predictions differ in would be the ControlNet as well as what was learned.
    """
    controlled = [options for _, options in source if options.get("control") is not None]
    if not controlled or any(options.get("control") is not None for _, options in target):
        return target
    shared = []
    for position, (embeds, options) in enumerate(target):
        giver = controlled[position % len(controlled)]
        names = ("control", "control_apply_to_uncond")
        shared.append([embeds, {**options, **{name: giver[name] for name in names if name in giver}}])
    return shared


class SigmaRange:
    """Part of the denoising, in percent of it; a range of nothing holds no noise level."""

    def __init__(self, start: float, end: float):
        self.start, self.end = start, end
        self._limits: tuple[Any, float, float] | None = None

    def holds(self, sampling, sigma: Tensor) -> bool:
        """Whether a step at this noise level, (batch,), lies in the range."""
        # Every number read from the device waits for all that is queued on it.
        if (self.start, self.end) == (0.0, 1.0):
            return True
        if self.start >= self.end:
            return False
        if self._limits is None or self._limits[0] is not sampling:
            limits = (float(sampling.percent_to_sigma(percent)) for percent in (self.start, self.end))
            self._limits = (sampling, *limits)
        _, start, end = self._limits
        return end <= float(sigma[0]) <= start


class TermGuider(comfy.samplers.CFGGuider):
    """Guidance by the text and by further terms, from as few UNet calls as memory allows."""

    rescale = 0.0

    @staticmethod
    def without_negative(options: Mapping[str, Any], text_scale: float) -> bool:
        """Whether the negative prediction cancels; cfg++ samplers need it all the same, and say so."""
        return math.isclose(text_scale, 1.0) and not options.get("disable_cfg1_optimization", False)

    def guided(
        self,
        conds: Sequence[Entries | None],
        combine: Callable[[Sequence[Tensor | None]], Tensor],
        x: Tensor,
        sigma: Tensor,
        options: Mapping[str, Any],
        *,
        text_scale: float,
        steered_by: int = 0,
    ) -> Tensor:
        """The guided denoised latent, (batch, channels, height, width).

        Args:
            conds: the text's, the negative one, then those of further terms; None is not computed.
            combine: from predictions in the order of ``conds``, None where there was no conditioning, to the guided
                one. Its text term has to be `text_guidance`.
            text_scale: of that term.
            steered_by: position of the text prediction whose standard deviation rescaling restores.
        """
        model = self.inner_model
        common = {"model": model, "input": x, "sigma": sigma, "model_options": options}
        if "sampler_calc_cond_batch_function" in options:
            predictions = options["sampler_calc_cond_batch_function"]({"conds": conds, **common})
        else:
            predictions = comfy.samplers.calc_cond_batch(model, conds, x, sigma, options)
        for function in options.get("sampler_pre_cfg_function", ()):
            arguments = {"conds": conds, "conds_out": predictions, "cond_scale": text_scale, "timestep": sigma}
            predictions = function({**arguments, **common})

        present = [None if cond is None else prediction for cond, prediction in zip(conds, predictions, strict=True)]
        guided = combine(present)
        text, negative = predictions[:2]
        if "sampler_cfg_function" in options:  # another node's rule for the text term; the other terms stay ours
            text_options = {key: value for key, value in options.items() if key != "sampler_post_cfg_function"}
            theirs = comfy.samplers.cfg_function(
                model, text, negative, text_scale, x, sigma, text_options, conds[0], conds[1]
            )
            guided = theirs + (guided - text_guidance(present[1], text, text_scale))
        if self.rescale:
            guided = self._rescaled(guided, predictions[steered_by], x, sigma)

        for function in options.get("sampler_post_cfg_function", ()):
            arguments = {"denoised": guided, "cond": conds[0], "uncond": conds[1], "cond_scale": text_scale}
            guided = function({**arguments, "uncond_denoised": negative, "cond_denoised": text, **common})
        return guided

    def _rescaled(self, guided: Tensor, text: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Rescale as the authors do: on what the network predicts (noise or velocity), not on denoised latents.

        For every kind of prediction the host's denoised latent is an affine function of it, so offset and
        slope are read off the host's own conversion.
        """
        to_denoised = self.inner_model.model_sampling.calculate_denoised
        offset = to_denoised(sigma, torch.zeros_like(x), x)
        slope = to_denoised(sigma, torch.ones_like(x), torch.zeros_like(x))
        rescaled = rescale_guidance((guided - offset) / slope, (text - offset) / slope, self.rescale)
        return offset + slope * rescaled


def scheduled_sigmas(model, steps: int, sampler_name: str, scheduler: str, denoise: float) -> Tensor:
    """The sigmas that the host's own KSampler would use."""
    return comfy.samplers.KSampler(
        model,
        steps=steps,
        device=model.load_device,
        sampler=sampler_name,
        scheduler=scheduler,
        denoise=denoise,
        model_options=model.model_options,
    ).sigmas


def sample_latent(
    guider: comfy.samplers.CFGGuider,
    latent: Mapping[str, Any],
    seed: int,
    steps: int,
    sampler_name: str,
    scheduler: str,
    denoise: float,
    *,
    callback: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """What KSampler does with a LATENT (batch, channels, height, width), under any guider.

    Args:
        callback: gets step, denoised latents, latents and number of steps; None shows a preview on the node.
    """
    model = guider.model_patcher
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    sampled = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler_name),
        scheduled_sigmas(model, steps, sampler_name, scheduler, denoise),
        denoise_mask=latent.get("noise_mask"),
        callback=callback or latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": sampled.to(comfy.model_management.intermediate_device())}
