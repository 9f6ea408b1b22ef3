"""Reward guidance in the host: one UNet call for the negative, base and personalized predictions of a step."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..models.dco import reward_guidance
from ..models.errors import ConfigError
from .guiding import Conditioning, SigmaRange, TermGuider, share_control
from .switchable_lora import chain, switched, tagged


class RewardGuider(TermGuider):
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
        self.range = SigmaRange(start_percent, end_percent)
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
        rewards = {name: scale for name, scale in self.reward_scales.items() if scale}
        if rewards and not self.range.holds(self.inner_model.model_sampling, timestep):
            rewards = {}
        negative = None if self.without_negative(options, self.cfg) else self._tagged("negative")
        conds = [self._tagged("base"), negative, *(self._tagged(name) for name in rewards)]

        def combine(predictions: Sequence[Tensor | None]) -> Tensor:
            base, uncond, *personalized = predictions
            scales = tuple(rewards.values())
            return reward_guidance(uncond, base, personalized, text_scale=self.cfg, reward_scales=scales)

        return self.guided(conds, combine, x, timestep, options, text_scale=self.cfg)

    def _tagged(self, name: str) -> list[dict[str, Any]]:
        return [tagged(cond, self.tags[name], name) for cond in self.conds[name]]
