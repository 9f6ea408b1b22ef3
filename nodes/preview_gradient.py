"""Lookahead preview guidance in the host: a wrapper around the prediction of any guider."""

import copy
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.taesd.taesd
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor, nn

from ..models.errors import ConfigError, FormatError, IncompatibleModelError
from ..models.formats import read_weights
from ..models.lookahead.preview_guidance import (
    PreviewLoss,
    consistency_preview,
    gradient_before,
    guided_shift,
    preview_gradient,
    weighted_loss,
)
from . import _host
from .differentiable import (
    DifferentiableCache,
    FixedControl,
    differentiable,
    differentiable_attention,
    recomputing,
)
from .guiding import SigmaRange
from .switchable_lora import TAG, RunCache, SwitchableLora, switched, switched_on

KEY = "personalize_preview_guidance"
"""Key of our wrappers and of the networks that are loaded with a MODEL."""


@dataclass(frozen=True)
class HostLoss:
    """A loss on previews with the networks of the host that it asks."""

    loss: PreviewLoss
    weight: float = 1.0
    networks: tuple[comfy.model_patcher.ModelPatcher, ...] = ()


@dataclass(frozen=True)
class Decoder:
    """What makes pictures of latents."""

    network: comfy.model_patcher.ModelPatcher
    decode: Callable[[nn.Module, Tensor], Tensor]
    """From the host's MODEL and latents as the UNet sees them to pictures (batch, 3, height, width) in -1..1."""

    @classmethod
    def of_vae(cls, vae, model) -> "Decoder":
        """Any VAE of the model's family; IncompatibleModelError for one of another latent size."""
        channels = model.get_model_object("latent_format").latent_channels
        if vae.latent_dim != 2 or vae.latent_channels != channels:
            raise IncompatibleModelError(
                f"this VAE decodes latents of {vae.latent_channels} channels, but this model's have {channels}; "
                "connect the model's own VAE, or a TAESD of its family"
            )

        def decode(network: nn.Module, latents: Tensor) -> Tensor:
            latents = network.process_latent_out(latents).to(vae.device, vae.vae_dtype)
            return vae.first_stage_model.decode(latents).float()

        return cls(vae.patcher, decode)

    @classmethod
    def approximate(cls, model) -> "Decoder":
        """The tiny decoder that the host shows previews with; ConfigError when the user has none."""
        latent_format = model.get_model_object("latent_format")
        wanted = latent_format.taesd_decoder_name or "taesd_decoder"
        found = [name for name in _host.model_files("vae_approx") if name.startswith(f"{wanted}.")]
        if not found:
            raise ConfigError(
                f"no decoder for previews: put {wanted}.safetensors into the folder models/vae_approx, or connect a VAE"
            )
        path = _host.model_path("vae_approx", found[0])
        network = comfy.taesd.taesd.Decoder(latent_format.latent_channels)
        try:
            network.load_state_dict(read_weights(path)[0])
        except RuntimeError as error:
            raise FormatError(f"{path.name} is no TAESD decoder; download it again, or connect a VAE") from error
        patcher = frozen(network)

        def decode(_network: nn.Module, latents: Tensor) -> Tensor:
            return patcher.model(latents.to(patcher.load_device)) * 2 - 1  # taught on latents as the UNet sees them

        return cls(patcher, decode)


class _Whole(comfy.model_patcher.ModelPatcher):
    """Moves its network as a whole: of layers that are not the host's own, some cannot stay behind."""

    def partially_load(self, device_to, extra_memory=0, *args, **kwargs):
        return super().partially_load(device_to, 1e32, *args, **kwargs)

    def partially_unload(self, *_args, **_kwargs):
        return 0  # then the host takes all of it away


def frozen(network: nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A network of ours for the host to move to the device and away, like its own."""
    memory = comfy.model_management
    network = network.train(False).requires_grad_(False)
    return _Whole(network, memory.get_torch_device(), memory.unet_offload_device())


@dataclass
class _Run:
    """What one sampling run knows: its noise levels, the picture around an inpainting mask, the adapters' cache."""

    sigmas: list[float]
    mask: Tensor | None
    around: Tensor | None
    cache: RunCache = field(default_factory=DifferentiableCache)

    def taken(self, sigma: Tensor) -> float:
        """Which part of a change at this noise level, (batch,), the sampler takes until the next one."""
        now = float(sigma[0])
        following = max((level for level in self.sigmas if level < now * (1 - 1e-4)), default=0.0)
        return 1 - following / now


class PreviewGuidance:
    """Shifts what a guider predicts against the gradient of a loss on the preview.

    Holds no state of a run, so that clones and threads may share it.
    """

    def __init__(
        self,
        losses: Sequence[HostLoss],
        decoder: Decoder,
        lcm: SwitchableLora | None,
        *,
        scale: float,
        start_percent: float,
        end_percent: float,
        through_model: bool,
    ):
        self.id = uuid.uuid4().hex
        self.loss = weighted_loss([(each.weight, each.loss) for each in losses])
        self.networks = _distinct([decoder.network, *(one for each in losses for one in each.networks)])
        self.decoder = decoder
        self.lcm = lcm
        self.scale = scale
        self.range = SigmaRange(start_percent, end_percent)
        self.through_model = through_model

    def __deepcopy__(self, memo: dict) -> "PreviewGuidance":
        return self

    def begin(self, executor, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs):
        """Wrapper of a whole run: remembers what an inpainting mask keeps."""
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options[self.id] = _Run(sigmas.tolist(), denoise_mask, latent_image)
        return executor(guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask, *args, **kwargs)

    def predict(self, executor, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: int | None = None):
        """Wrapper of a prediction: the denoised latent, (batch, channels, height, width), that the sampler follows."""
        denoised = executor(x, timestep, model_options, seed)
        guider = executor.class_obj
        if not self.range.holds(guider.inner_model.model_sampling, timestep):
            return denoised
        _host.raise_if_interrupted()
        with _host.leave_inference_mode():
            shift = self._shift(guider, x, denoised, timestep, model_options)
        return denoised + shift.to(denoised)

    def _shift(self, guider, x: Tensor, denoised: Tensor, sigma: Tensor, options: dict) -> Tensor:
        model = guider.inner_model
        run = options["transformer_options"][self.id]
        x, sigma = x.clone(), sigma.clone()  # made in inference mode
        networks = [patcher.model for patcher in self.networks]
        if not self.through_model:
            with torch.no_grad():
                latents = self._look_ahead(guider, run, x, denoised, sigma, options)
            with differentiable(*networks):
                gradient, losses = self._picture_gradient(model, run, latents)
        else:
            x.requires_grad_()
            with differentiable(model, *networks), recomputing(model.diffusion_model):
                latents = self._look_ahead(guider, run, x, None, sigma, options)
                gradient, losses = self._picture_gradient(model, run, latents)
                gradient = gradient_before(latents, x, gradient)
        region = None if run.mask is None else run.mask.clone()
        return guided_shift(gradient, losses, self.scale, taken=run.taken(sigma), region=region)

    def _look_ahead(
        self, guider, run: _Run, x: Tensor, denoised: Tensor | None, sigma: Tensor, options: dict
    ) -> Tensor:
        """Final latents as the consistency model sees them from here."""
        model = guider.inner_model
        if self.lcm is not None or denoised is None:
            transformer_options = switched_on(options["transformer_options"], self.lcm, run.cache)
            transformer_options.setdefault("optimized_attention_override", differentiable_attention)
            options = {**options, "transformer_options": transformer_options}
            entries = [self._entry(cond) for cond in guider.conds["positive"]]
            (denoised,) = comfy.samplers.calc_cond_batch(model, [entries], x, sigma, options)
        timesteps = model.model_sampling.timestep(sigma)
        return consistency_preview(denoised, x, sigma, timesteps)

    def _entry(self, cond: Mapping[str, Any]) -> dict[str, Any]:
        """A conditioning for the preview: with the consistency model on, and without what has no gradient."""
        entry = {name: value for name, value in cond.items() if name != "gligen"}
        if entry.get("control") is not None:
            entry["control"] = FixedControl(entry["control"])
        if TAG in entry and self.lcm is not None:
            entry[TAG] = {**entry[TAG], **switched([self.lcm])}
        return entry

    def _picture_gradient(self, model, run: _Run, latents: Tensor) -> tuple[Tensor, Tensor]:
        if run.mask is None:
            return preview_gradient(latents, lambda one: self.decoder.decode(model, one), self.loss)
        mask, around = run.mask.clone().expand_as(latents), run.around.clone().expand_as(latents)
        composed = mask * latents.detach() + (1 - mask) * around  # the picture that will come of it
        gradient, losses = preview_gradient(composed, lambda one: self.decoder.decode(model, one), self.loss)
        return gradient * mask, losses


def guide_by_preview(guider, guidance: PreviewGuidance):
    """A copy of a GUIDER that also follows the guidance; the guider itself and its MODEL stay as they are."""
    guided = copy.copy(guider)
    guided.model_patcher = model = guider.model_patcher.clone()
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, guidance.begin)
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, guidance.predict)
    model.set_additional_models(KEY, _distinct([*model.get_additional_models_with_key(KEY), *guidance.networks]))
    return guided


def _distinct(patchers: Sequence[comfy.model_patcher.ModelPatcher]) -> list[comfy.model_patcher.ModelPatcher]:
    """One patcher of each network; the host clones those that belong to a MODEL with it."""
    return list({id(patcher.model): patcher for patcher in patchers}.values())
