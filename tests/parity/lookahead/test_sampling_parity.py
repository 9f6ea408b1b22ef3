"""Whole trajectories of the authors' pipelines through one diffusers UNet, and the solver that they take."""

from collections.abc import Collection, Sequence

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler
from diffusers.schedulers import scheduling_lcm

from comfyui_personalize.models.lookahead import (
    Row,
    few_step_weights,
    guidance_weights,
    lookahead_guidance,
    plain_weights,
)
from comfyui_personalize.models.schedules import NoiseSchedule
from comfyui_personalize.trainers.conditioning import Conditioning
from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention
from comfyui_personalize.trainers.sampling import sample

PROMPTS = ("uncond", "text")


def solver(case):
    """The authors' solver, which then had no other last sigma than the schedule's smallest."""
    settings = case.config["scheduler_base_config"] | case.config.get("scheduler_overrides", {})
    return DPMSolverMultistepScheduler.from_config(settings, final_sigmas_type="sigma_min")


class Sampler:
    """The recorded prompts and reference on one UNet."""

    def __init__(self, case, unet, encoder, freeu):
        self.identity, self.freeu = IdentityAttention(unet, encoder), freeu
        self.config, self.start = case.config, case.inputs["init_latents"]
        self.reference = case.inputs["cond_latent_unscaled"] * self.config["vae_scaling_factor"]
        settings = self.config["scheduler_base_config"]
        assert settings["beta_schedule"] == "scaled_linear"
        self.schedule = NoiseSchedule.scaled_linear(
            settings["prediction_type"],
            timesteps=settings["num_train_timesteps"],
            beta_start=settings["beta_start"],
            beta_end=settings["beta_end"],
        )
        self.told = {
            kind: {"text": self._conditioning(*told), "uncond": self._conditioning(*map(torch.zeros_like, told))}
            for kind, told in (
                ("decoder", (case.inputs["text"], case.inputs["pooled"])),
                ("encoder", (case.inputs["enc_text"], case.inputs["enc_pooled"])),
            )
        }
        tokens = {"uncond": case.inputs["adapter_uncond"], "text": case.inputs["adapter_cond"]}
        self.adapter = {prompt: self.identity.adapter(tokens[prompt]) for prompt in PROMPTS}

    def _conditioning(self, embeds, pooled) -> Conditioning:
        height, width = (8 * side for side in self.start.shape[2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(embeds), dtype=embeds.dtype)
        return Conditioning(embeds, pooled, sizes)

    def encoder_input(self, timestep):
        """The reference under the noise that sampling started from, the same in every step."""
        if not self.config["noisy_encoder_input"]:
            return self.reference
        return self.schedule.add_noise(self.reference, self.start, timestep.expand(len(self.start)))

    def predictions(self, x, timestep, rows: Collection[Row]) -> dict[Row, torch.Tensor]:
        """The rows of guidance that are asked for, and no others."""
        found = {}
        for kind in ("plain", "shared"):
            prompts = [prompt for prompt in PROMPTS if f"{kind}_{prompt}" in rows]
            if not prompts:
                continue
            told = {}
            if kind == "shared":
                told["reference"] = self.identity.encode(
                    torch.cat([self.encoder_input(timestep)] * len(prompts)),
                    timestep,
                    Conditioning.join(*(self.told["encoder"][prompt] for prompt in prompts)),
                )
            with self.freeu(self.config["freeu"] or {}):  # of the decoder alone
                prediction = self.identity.predict(
                    torch.cat([x] * len(prompts)),
                    timestep,
                    Conditioning.join(*(self.told["decoder"][prompt] for prompt in prompts)),
                    adapter=self._adapter(prompts),
                    adapter_scale=self.config["adapter_attention_scale"],
                    **told,
                )
            found |= zip((f"{kind}_{prompt}" for prompt in prompts), prediction.chunk(len(prompts)), strict=True)
        return found

    def _adapter(self, prompts: Sequence[str]):
        pairs = {block: [self.adapter[prompt][block] for prompt in prompts] for block in self.adapter["text"]}
        return {block: tuple(map(torch.cat, zip(*found, strict=True))) for block, found in pairs.items()}


@pytest.mark.golden("lookahead", "06_*", "06[b-g]_*")
@torch.no_grad()
def test_trajectory(case, tiny_unet, encoder, freeu, monkeypatch):
    few_steps, sharing = "lcm" in case.path.stem, "nokv" not in case.path.stem
    config = case.config
    sampler = Sampler(case, tiny_unet, encoder, freeu)
    if few_steps:
        scheduler = LCMScheduler.from_config(config["scheduler_base_config"])
        draws = iter(case.inputs["step_noise"])
        monkeypatch.setattr(scheduling_lcm, "randn_tensor", lambda *shape, **told: next(draws))
        weights = few_step_weights(sharing=sharing)
    elif sharing:
        scheduler = solver(case)
        weights = guidance_weights(*(config[f"guidance_scale_{name}"] for name in ("nokv", "full", "kv")))
    else:
        scheduler = solver(case)
        weights = plain_weights(config["guidance_scale"])
    recorded = {"full": "shared", "nokv": "plain"}
    every = [f"{kind}_{prompt}" for kind in recorded.values() if sharing or kind == "plain" for prompt in PROMPTS]
    guided, encoded = [], []

    def predict(x, timestep):
        predictions = sampler.predictions(x, timestep, weights if guided else every)
        if not guided:
            for name, kind in recorded.items():
                if f"first_{name}" in case.expected:
                    both = [predictions[f"{kind}_{prompt}"] for prompt in PROMPTS]
                    case.check(f"first_{name}", torch.cat(both))
        guided.append(lookahead_guidance(predictions, weights))
        encoded.append(sampler.encoder_input(timestep))
        return guided[-1]

    states = list(sample(scheduler, predict, sampler.start, config["num_inference_steps"]))
    case.check("latents", torch.stack(states))
    case.check("noise_pred", torch.stack(guided))
    case.check("timesteps", scheduler.timesteps)
    if "encoder_input" in case.expected:
        case.check("encoder_input", torch.stack(encoded))
    if not few_steps:
        case.check("sigmas", scheduler.sigmas)
    else:
        assert next(draws, None) is None


@pytest.mark.golden("lookahead", "06t_*")
def test_solver(case):
    for run in {name.split(".")[0] for name in case.inputs}:
        latents, outputs = case.inputs[f"{run}.latents"], case.inputs[f"{run}.eps"]
        scheduler, remaining = solver(case), iter(outputs)
        states = list(sample(scheduler, lambda x, timestep, rest=remaining: next(rest), latents, len(outputs)))
        noised = [scheduler.add_noise(latents, outputs[0], timestep[None]) for timestep in scheduler.timesteps]

        case.check(f"{run}.latents", torch.stack(states))
        case.check(f"{run}.add_noise", torch.stack(noised))
        case.check(f"{run}.timesteps", scheduler.timesteps)
        case.check(f"{run}.sigmas", scheduler.sigmas)
