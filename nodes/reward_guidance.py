"""Reward guidance in the host: one UNet call for the negative, base and personalized predictions of a step."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..models.dco import rescale_guidance, reward_guidance
from ..models.errors import ConfigError
from .switchable_lora import chain, switched, tagged

Conditioning = list[tuple[Tensor, dict[str, Any]]]


def share_control(source: Conditioning, target: Conditioning) -> Conditioning:
    """``target`` under the ControlNets of ``source`` when it has none of its own.

    Without this, the reward term would measure the ControlNet as well as what was learned.
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


class RewardGuider(comfy.samplers.CFGGuider):
    """ε_∅ + w_text (ε_base - ε_∅) + Σ_k w_k (ε_k - ε_base), with the LoRAs on in the ε_k rows alone.

    The personalized conditioning is called "positive" because the host copies a ControlNet that was applied
    to "positive" onto all other lists when it was meant for both.
    """

    def __init__(
        self,
        model,
        *,
        personalized: Conditioning,
        base: Conditioning,
        negative: Conditioning,
        text_scale: float,
        reward_scale: float,
        rescale: float = 0.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        personalized_2: Conditioning | None = None,
        reward_scale_2: float = 0.0,
    ):
        super().__init__(model)
        loras = chain(model)
        if personalized_2 is not None and len(loras) < 2:
            raise ConfigError(
                f"personalized_2 needs two LoRAs to tell apart, but this model carries {len(loras)}; "
                "chain two Load DCO LoRA nodes, or disconnect personalized_2"
            )
        if not loras:
            logging.warning(
                "Reward guidance: the model carries no switchable LoRA, so the reward term only compares the "
                "personalized prompt with the base prompt; load the LoRA with Load DCO LoRA"
            )
        self.set_cfg(text_scale)
        self.rescale = rescale
        self.percents = (start_percent, end_percent)
        self._limits: tuple[Any, float, float] | None = None
        self.reward_scales = {"positive": reward_scale}
        self.tags = {"negative": {}, "base": {}, "positive": switched(loras)}
        conds = {"positive": personalized, "base": share_control(personalized, base), "negative": negative}
        if personalized_2 is not None:
            conds["positive_2"] = share_control(personalized, personalized_2)
            self.reward_scales["positive_2"] = reward_scale_2
            self.tags["positive"], self.tags["positive_2"] = switched(loras[:-1]), switched(loras[-1:])
        self.inner_set_conds(conds)

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
        """The guided denoised latent, (batch, channels, height, width); named by the host."""
        options = model_options or {}
        model = self.inner_model
        rewards = {name: scale for name, scale in self.reward_scales.items() if scale}
        if rewards and not self._in_range(timestep):
            rewards = {}
        # cfg++ samplers need the negative prediction even where it cancels, and say so in this way.
        without_negative = math.isclose(self.cfg, 1.0) and not options.get("disable_cfg1_optimization", False)
        base_cond = self._tagged("base")
        negative_cond = None if without_negative else self._tagged("negative")
        conds = [base_cond, negative_cond, *(self._tagged(name) for name in rewards)]

        common = {"model": model, "input": x, "sigma": timestep, "model_options": options}
        if "sampler_calc_cond_batch_function" in options:
            predictions = options["sampler_calc_cond_batch_function"]({"conds": conds, **common})
        else:
            predictions = comfy.samplers.calc_cond_batch(model, conds, x, timestep, options)
        for function in options.get("sampler_pre_cfg_function", ()):
            arguments = {"conds": conds, "conds_out": predictions, "cond_scale": self.cfg, "timestep": timestep}
            predictions = function({**arguments, **common})
        base, negative, *personalized = predictions

        guided = self._combine(base, None if without_negative else negative, personalized, tuple(rewards.values()))
        if "sampler_cfg_function" in options:  # another node's rule for the text term; the reward term stays ours
            text_options = {key: value for key, value in options.items() if key != "sampler_post_cfg_function"}
            theirs = comfy.samplers.cfg_function(
                model, base, negative, self.cfg, x, timestep, text_options, base_cond, negative_cond
            )
            guided = theirs + (guided - self._combine(base, None if without_negative else negative, (), ()))
        if self.rescale:
            guided = self._rescaled(guided, base, x, timestep)

        for function in options.get("sampler_post_cfg_function", ()):
            arguments = {"denoised": guided, "cond": base_cond, "uncond": negative_cond, "cond_scale": self.cfg}
            guided = function({**arguments, "uncond_denoised": negative, "cond_denoised": base, **common})
        return guided

    def _combine(self, base: Tensor, negative: Tensor | None, personalized: Sequence[Tensor], scales: Sequence[float]):
        return reward_guidance(negative, base, personalized, text_scale=self.cfg, reward_scales=scales)

    def _tagged(self, name: str) -> list[dict[str, Any]]:
        return [tagged(cond, self.tags[name], name) for cond in self.conds[name]]

    def _in_range(self, timestep: Tensor) -> bool:
        # Every number read from the device waits for all that is queued on it.
        if self.percents == (0.0, 1.0):
            return True
        sampling = self.inner_model.model_sampling
        if self._limits is None or self._limits[0] is not sampling:
            self._limits = (sampling, *(float(sampling.percent_to_sigma(percent)) for percent in self.percents))
        _, start, end = self._limits
        return end <= float(timestep[0]) <= start

    def _rescaled(self, guided: Tensor, base: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Rescale as the authors do: on what the network predicts (noise or velocity), not on denoised latents.

        For every kind of prediction the host's denoised latent is an affine function of it, so offset and
        slope are read off the host's own conversion.
        """
        to_denoised = self.inner_model.model_sampling.calculate_denoised
        offset = to_denoised(sigma, torch.zeros_like(x), x)
        slope = to_denoised(sigma, torch.ones_like(x), torch.zeros_like(x))
        rescaled = rescale_guidance((guided - offset) / slope, (base - offset) / slope, self.rescale)
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
) -> dict[str, Any]:
    """What KSampler does with a LATENT (batch, channels, height, width), under any guider."""
    model = guider.model_patcher
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    sampled = guider.sample(
        noise,
        samples,
        comfy.samplers.sampler_object(sampler_name),
        scheduled_sigmas(model, steps, sampler_name, scheduler, denoise),
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(model, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return {**latent, "samples": sampled.to(comfy.model_management.intermediate_device())}
