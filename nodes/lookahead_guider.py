"""LCM-Lookahead in the host: a reference shared with self-attention, an adapter, and guidance with three scales."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.errors import ConfigError
from ..models.guidance import text_guidance
from ..models.lookahead import Row, for_batch, guidance_weights, lookahead_guidance
from ..models.lookahead.encoder import LookaheadEncoder
from ..models.lookahead.identity import Identity
from .guiding import Conditioning, Entries, SigmaRange, TermGuider
from .identity_attention import KEY, ROLES, RUN, IdentityAttention, Role, Run, check_fit, encoder_lora
from .switchable_lora import TAG, attach, chain, switched, tagged

Mode = Literal["attention sharing", "adapter only"]
ReferenceNoise = Literal["each picture's own", "the first picture's", "none"]

ROWS: dict[Row, tuple[str, Role]] = {
    "plain_text": ("positive", Role(tokens="cond")),
    "plain_uncond": ("negative", Role(tokens="uncond")),
    "shared_text": ("positive", Role(tokens="cond", shared="text")),
    "shared_uncond": ("negative", Role(tokens="uncond", shared="uncond")),
}
"""Prediction -> whose conditioning it has, and what the identity does in it."""
_ENCODER_ROWS = {
    "text": ("encoder_positive", Role(keep="text")),
    "uncond": ("encoder_negative", Role(keep="uncond")),
}
_SIZES = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")


class LookaheadGuider(TermGuider):
    """p_∅ + w_text (p_text - p_∅) + w_full (s_text - p_∅) + w_identity (s_∅ - p_∅), where s shares attention.

    Where no attention is shared the text and the full scale act on the same prediction and the identity scale on none,
    so that the encoder pass is left out.
    """

    def __init__(
        self,
        model,
        *,
        encoder: LookaheadEncoder,
        identity: Identity,
        positive: Conditioning,
        negative: Conditioning,
        mode: Mode = "attention sharing",
        text_scale: float = 3.0,
        full_scale: float = 2.0,
        identity_scale: float = 2.0,
        adapter_scale: float = 1.0,
        sharing_strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        reference_noise: ReferenceNoise = "each picture's own",
        few_step: bool = False,
        rescale: float = 0.0,
        encoder_prompt: Conditioning | None = None,
        region: Tensor | None = None,
    ):
        check_fit(model, encoder)
        identity.check_made_by(encoder.resampler, encoder.name)
        sharing = mode == "attention sharing"
        if sharing and identity.latents is None:
            raise ConfigError(
                "sharing attention needs the reference picture's latent, and this identity was made without a VAE; "
                "connect a VAE to Encode Identity, or set the mode to adapter only"
            )
        if sharing and not encoder.trained:
            raise ConfigError(
                f"{encoder.name} is a plain IP-Adapter, whose attention was never trained to share; set the mode to "
                "adapter only, or load a lookahead encoder"
            )
        self.sharing = sharing and sharing_strength > 0
        self.range = SigmaRange(start_percent, end_percent)
        self.scales = (text_scale, full_scale, identity_scale) if sharing else (text_scale, 0.0, 0.0)
        self.few_step, self.rescale = few_step, rescale
        self.reference_noise = reference_noise
        self.identity = identity

        loras = chain(model)
        self.decoding = switched(loras)
        self.encoding: dict[str, float] = {}
        if self.sharing and encoder.lora:
            lora = encoder_lora(model, encoder)
            self.encoding = switched([lora])
            model = attach(model, lora)
        attention = IdentityAttention(
            model, encoder, identity, adapter_scale=adapter_scale, sharing_strength=sharing_strength, region=region
        )
        model = model.clone()
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, attention)
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._start)
        super().__init__(model)
        self.set_cfg(text_scale)
        self.encoder_prompt = _bare(encoder_prompt or positive)
        self.inner_set_conds(
            {
                "positive": positive,
                "negative": negative,
                "encoder_positive": self.encoder_prompt,
                "encoder_negative": _zeroed(self.encoder_prompt),
            }
        )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
        """The guided denoised latent, (batch, channels, height, width); named by the host."""
        options = dict(model_options or {})
        shares = self.sharing and self.range.holds(self.inner_model.model_sampling, timestep)
        text_scale, full_scale, identity_scale = self.scales
        if self.few_step:
            rows = ["shared_text" if shares else "plain_text"]
        elif shares:
            weights = guidance_weights(*self.scales)
            rows = list(weights)
            if any(name.endswith("cfg_function") for name in options):  # rules of other nodes, for two predictions
                rows += ["plain_text", "plain_uncond"]
        else:
            text_scale += full_scale
            rows = ["plain_text"] if self.without_negative(options, text_scale) else ["plain_text", "plain_uncond"]
        if shares:
            self._encode(timestep, options, {ROWS[row][1].shared for row in rows} - {None})

        conds = self._with_roles({row: ROWS[row] if row in rows else None for row in ROWS}, options)
        if self.few_step:
            conds = [conds[rows[0]], None]
            return self.guided(conds, lambda predictions: predictions[0], x, timestep, options, text_scale=1.0)

        def combine(predictions: Sequence[Tensor | None]) -> Tensor:
            found = {row: prediction for row, prediction in zip(ROWS, predictions) if prediction is not None}
            if shares:
                return lookahead_guidance(found, weights)
            return text_guidance(found.get("plain_uncond"), found["plain_text"], text_scale)

        steered_by = list(ROWS).index("shared_text" if "shared_text" in rows else "plain_text")
        conds = list(conds.values())
        return self.guided(conds, combine, x, timestep, options, text_scale=text_scale, steered_by=steered_by)

    def _encode(self, sigma: Tensor, options: dict, names: set[str]) -> None:
        """Keep keys and values of the references at this noise level, unless the last step left them."""
        run: Run = options["transformer_options"][RUN]
        level = float(sigma[0])
        if run.sigma != level:
            run.references.clear()
            run.sigma = level
        if not (missing := sorted(names - run.references.keys())):
            return
        sampling, latents = self.inner_model.model_sampling, run.latents
        sigma = sigma[:1].expand(len(latents))
        if run.noise is None:  # the network itself shall see clean latents
            x = latents / sampling.calculate_input(sigma, torch.ones_like(latents))
        else:
            x = sampling.noise_scaling(sigma, run.noise, latents)
        # FreeU, attention patches and the like belong to the picture; the encoder is trained on the plain UNet.
        plain = {key: value for key, value in options["transformer_options"].items() if not key.startswith("patches")}
        options = {**options, "transformer_options": plain}
        conds = self._with_roles({name: _ENCODER_ROWS[name] for name in missing}, options)
        comfy.samplers.calc_cond_batch(self.inner_model, list(conds.values()), x, sigma, options)

    def _with_roles(self, rows: Mapping[str, tuple[str, Role] | None], options: dict) -> dict[str, Entries | None]:
        """Conditionings of the rows, and in ``options`` what the identity does in each; None stays None."""
        roles: dict[Any, Role] = {}
        found: dict[str, Entries | None] = {}
        for row, entry in rows.items():
            found[row] = None
            if entry is not None:
                name, role = entry
                found[row] = [self._switched(cond, role, row) for cond in self.conds[name]]
                roles |= {cond["uuid"]: role for cond in found[row]}
        options["transformer_options"] = {**options.get("transformer_options", {}), ROLES: roles}
        return found

    def _switched(self, cond: dict[str, Any], role: Role, row: str) -> dict[str, Any]:
        """A conditioning with the LoRAs of its role: the encoder's in the encoder pass, those of the user elsewhere."""
        if role.keep:
            cond = {key: value for key, value in cond.items() if key != "control"}  # the host may have copied one here
            return tagged(cond, self.encoding, row)
        return tagged(cond, cond.get(TAG, self.decoding), row)

    def _start(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        """Wrapper of a sampling run: prepare the references and what belongs to this run alone."""
        people, batch = self.identity.people, len(noise)
        if people not in (1, batch):
            raise ConfigError(
                f"the identity holds {people} people for a batch of {batch} pictures; give one, or one for each picture"
            )
        run = Run()
        if self.sharing:
            self._prepare(run, guider, noise, extra_args.get("seed") or 0)
        extra_args["model_options"].setdefault("transformer_options", {})[RUN] = run
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def _prepare(self, run: Run, guider, noise: Tensor, seed: int) -> None:
        latents = guider.inner_model.process_latent_in(self.identity.latents.to(noise.device, torch.float32))
        own = self.reference_noise == "each picture's own" and not (noise == noise[:1]).all()
        prompts = max(len(embeds) for embeds, _ in self.encoder_prompt)
        rows = len(noise) if own or prompts > 1 else len(latents)
        run.pictures = latents.shape[1]
        run.latents = for_batch(latents, rows).flatten(0, 1)
        if self.reference_noise == "none":
            return
        drawn = noise if own else noise[:1].expand(rows, *noise.shape[1:])
        if drawn.shape[-2:] != latents.shape[-2:]:
            # The run's own noise has no pixel for each of the reference's.
            generator = torch.Generator().manual_seed(seed)
            shape = (rows if own else 1, *latents.shape[2:])
            drawn = torch.randn(shape, generator=generator).to(noise.device).expand(rows, *shape[1:])
        run.noise = drawn.to(latents.dtype).repeat_interleave(run.pictures, dim=0)


def _bare(conditioning: Conditioning) -> Conditioning:
    """The first prompt without areas, masks, ranges and ControlNets, which are meant for the picture."""
    embeds, options = conditioning[0]
    return [[embeds, {key: value for key, value in options.items() if key in ("pooled_output", *_SIZES)}]]


def _zeroed(conditioning: Conditioning) -> Conditioning:
    """What the authors encode an empty prompt to."""
    ((embeds, options),) = conditioning
    pooled = options.get("pooled_output")
    zeros = {} if pooled is None else {"pooled_output": torch.zeros_like(pooled)}
    return [[torch.zeros_like(embeds), {**options, **zeros}]]
