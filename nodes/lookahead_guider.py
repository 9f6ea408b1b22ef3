"""LCM-Lookahead in the host: a reference shared with self-attention, an adapter, and guidance with three scales."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..models.errors import ConfigError
from ..models.guidance import text_guidance
from ..models.lookahead import Row, few_step_weights, for_batch, guidance_weights, lookahead_guidance
from ..models.lookahead.encoder import LookaheadEncoder
from ..models.lookahead.identity import Identity
from .encoder_fit import check_fit, encoder_lora
from .guiding import Conditioning, Entries, SigmaRange, TermGuider
from .identity_attention import IdentityAttention
from .identity_roles import KEY, ROLES, RUN, Role, Run
from .rank_one_edits import KEY as EDITS
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
        if rescale and not (few_step or text_scale or (sharing and full_scale)):
            raise ConfigError(
                "guidance is rescaled to a prediction with text, and the text and the full scale are 0; raise one of "
                "them, or set rescale to 0"
            )
        region = None if region is None else region.reshape(-1, *region.shape[-2:])
        self.sharing = sharing and sharing_strength > 0
        self.range = SigmaRange(start_percent, end_percent)
        self.scales = (text_scale, full_scale, identity_scale) if sharing else (text_scale, 0.0, 0.0)
        self.few_step, self.rescale = few_step, rescale
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
        prompt = _bare(encoder_prompt or positive)
        start = _Start(
            identity, region, self.sharing, reference_noise, prompts=max(len(embeds) for embeds, _ in prompt)
        )
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, start)
        super().__init__(model)
        self.set_cfg(text_scale)
        self.inner_set_conds(
            {
                "positive": positive,
                "negative": negative,
                "encoder_positive": prompt,
                "encoder_negative": _zeroed(prompt),
            }
        )

    def predict_noise(self, x: Tensor, timestep: Tensor, model_options: dict | None = None, seed: int | None = None):
        """The guided denoised latent, (batch, channels, height, width); named by the host."""
        options = dict(model_options or {})
        shares = self.sharing and self.range.holds(self.inner_model.model_sampling, timestep)
        text_scale, full_scale, identity_scale = self.scales
        if self.few_step:
            rows = list(few_step_weights(sharing=shares))
            if not self.without_negative(options, 1.0):
                rows.append("plain_uncond")
        elif shares:
            weights = guidance_weights(*self.scales)
            rows = list(weights)
            if any(name.endswith("cfg_function") for name in options):  # rules of other nodes, for two predictions
                rows += ["plain_text", "plain_uncond"]
        else:
            text_scale += full_scale
            rows = ["plain_text"] if self.without_negative(options, text_scale) else ["plain_text", "plain_uncond"]
        if not shares:
            options["transformer_options"][RUN].references.clear()
        else:
            self._encode(timestep, options, {ROWS[row][1].shared for row in rows} - {None})

        conds = self._with_roles({row: ROWS[row] if row in rows else None for row in ROWS}, options)
        if self.few_step:
            conds = [conds[rows[0]], conds["plain_uncond"]]
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
        options = {**options, "transformer_options": _plain(options["transformer_options"])}
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
                # The host adds entries to the encoder's lists where others have areas.
                entries = self.conds[name][:1] if role.keep else self.conds[name]
                found[row] = [self._switched(cond, role, row) for cond in entries]
                roles |= {cond["uuid"]: replace(role, area=cond.get("area")) for cond in found[row]}
        options["transformer_options"] = {**options.get("transformer_options", {}), ROLES: roles}
        return found

    def _switched(self, cond: dict[str, Any], role: Role, row: str) -> dict[str, Any]:
        """A conditioning with the LoRAs of its role: the encoder's in the encoder pass, those of the user elsewhere."""
        if role.keep:  # without areas and ControlNets, which the host may have copied here
            return tagged({key: cond[key] for key in ("model_conds", "uuid")}, self.encoding, row)
        return tagged(cond, cond.get(TAG, self.decoding), row)


@dataclass(frozen=True)
class _Start:
    """Wrapper of a sampling run: prepares the references and what belongs to this run alone.

    It knows nothing of the guider: a model that led back to it would never be freed.
    """

    identity: Identity
    region: Tensor | None
    sharing: bool
    reference_noise: ReferenceNoise
    prompts: int
    """Prompts of the encoder pass: one for all pictures, or one each."""

    def __deepcopy__(self, memo: dict) -> "_Start":
        return self

    def __call__(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        people, batch = self.identity.people, len(noise)
        if people not in (1, batch):
            raise ConfigError(
                f"the identity holds {people} people for a batch of {batch} pictures; give one, or one for each picture"
            )
        if self.region is not None and len(self.region) not in (1, batch):
            raise ConfigError(
                f"the region holds {len(self.region)} masks for a batch of {batch} pictures; give one, or one for each"
            )
        run = Run(size=tuple(noise.shape[-2:]))
        if self.sharing:
            self._prepare(run, guider.inner_model, noise, extra_args.get("seed") or 0)
        extra_args["model_options"].setdefault("transformer_options", {})[RUN] = run
        return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)

    def _prepare(self, run: Run, model, noise: Tensor, seed: int) -> None:
        if not noise.any():  # a later stage of a sampling that was split: its noise is in the latent
            noise = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed)).to(noise)
        latents = model.process_latent_in(self.identity.latents.to(noise.device, torch.float32))
        own = self.reference_noise == "each picture's own" and not (noise == noise[:1]).all()
        rows = len(noise) if own or self.prompts > 1 else len(latents)
        run.pictures = latents.shape[1]
        run.latents = for_batch(latents, rows).transpose(0, 1).flatten(0, 1)
        if self.reference_noise == "none":
            return
        drawn = noise if own else noise[:1].expand(rows, *noise.shape[1:])
        if drawn.shape[-2:] != latents.shape[-2:]:
            drawn = torch.stack([_noise_like(row, latents.shape[2:]) for row in drawn])
        run.noise = drawn.to(latents.dtype).repeat(run.pictures, 1, 1, 1)


def _noise_like(noise: Tensor, shape: Sequence[int]) -> Tensor:
    """Noise of another shape, decided by a picture's noise alone, whatever its place in the batch."""
    digest = hashlib.sha256(noise.to("cpu", torch.float32).contiguous().numpy())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big", signed=True))
    return torch.randn(tuple(shape), generator=generator).to(noise)


def _plain(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """The options without FreeU, attention patches and concepts, which belong to the picture.

    The encoder is trained on the plain UNet.
    """
    plain = {key: value for key, value in transformer_options.items() if not key.startswith("patches")}
    wrappers = {kind: dict(keys) for kind, keys in transformer_options.get("wrappers", {}).items()}
    wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).pop(EDITS, None)
    return {**plain, "wrappers": wrappers}


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
