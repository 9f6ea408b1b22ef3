"""Pictures of a person while the encoder is being trained: guided in many steps, or under the LCM LoRA in a few."""

from collections.abc import Collection

import torch
from torch import Tensor

from ...models.lookahead import guidance_weights, lookahead_guidance, preview
from ..conditioning import Conditioning
from ..devices import autocast
from ..progress import Progress
from ..sampling import euler, sample
from ..vae import LATENT_CHANNELS
from .config import LookaheadConfig
from .identity_attention import KeysValues
from .loading import Loaded
from .step import Rows

SCALES = (3.0, 2.0, 2.0)
"""Of the text, of text and reference, and of the reference; the authors' (infer.py)."""
LCM_STEPS = 4


class PersonSampler:
    """Samples with the encoder as it is, in the manner of the authors' pipeline."""

    def __init__(self, config: LookaheadConfig, loaded: Loaded, device: torch.device, progress: Progress):
        self._config, self._loaded, self._device, self._progress = config, loaded, device, progress

    @torch.no_grad()
    def sample(self, rows: Rows, prompt: str, seed: int, *, few_step: bool = False) -> Tensor | None:
        """A picture, (1, 3, side, side) in about -1..1; None when the user cancels meanwhile.

        Args:
            rows: of one pair, whose reference the encoder sees.
            few_step: under the LCM LoRA at full strength, in four steps without guidance.
        """
        loaded, generator = self._loaded, torch.Generator().manual_seed(seed)
        side = rows.reference.shape[-1]
        start = torch.randn(1, LATENT_CHANNELS, side, side, generator=generator).to(self._device)
        with autocast(self._config.precision, self._device):
            one = _Person(self._config, loaded, rows, prompt, start)
            states = self._few(one, start, generator) if few_step else self._guided(one, start)
            for latents in states:  # noqa: B007
                if self._progress.cancelled():
                    return None
        return loaded.decoder.decode(latents)

    def _guided(self, one: "_Person", start: Tensor):
        weights = guidance_weights(*SCALES)

        def predict(x: Tensor, timestep: Tensor) -> Tensor:
            return lookahead_guidance(one.predictions(x, timestep.long()), weights)

        return sample(euler(self._loaded.schedule), predict, start, self._config.preview_steps)

    def _few(self, one: "_Person", start: Tensor, generator: torch.Generator):
        """Multistep consistency sampling (arXiv 2303.01469, algorithm 1)."""
        schedule, latents = self._loaded.schedule, start
        times = [schedule.timesteps * left // LCM_STEPS - 1 for left in range(LCM_STEPS, 0, -1)]
        for place, time in enumerate(times):
            timesteps = torch.full((1,), time, device=start.device)
            if place:
                noise = torch.randn(latents.shape, generator=generator).to(start.device)
                latents = schedule.add_noise(latents, noise, timesteps)
            latents = preview(schedule, one.shared_text(latents, timesteps), latents, timesteps)
            yield latents


class _Person:
    """The predictions that guidance combines, of one reference and prompt."""

    def __init__(self, config: LookaheadConfig, loaded: Loaded, rows: Rows, text: str, start: Tensor):
        self._config, self._loaded, self._rows, self._start = config, loaded, rows, start
        prompt, self._tell = loaded.told([text]), loaded.tell([text])
        nothing = Conditioning(*map(torch.zeros_like, (prompt.embeds, prompt.pooled)), prompt.time_ids)
        self._prompts = {"uncond": nothing, "text": prompt}
        told = rows.reference_prompt
        blank = Conditioning(*map(torch.zeros_like, (told.embeds, told.pooled)), told.time_ids)
        self._reference_prompts = {"uncond": blank, "text": told}
        resampler, identity = loaded.resampler, loaded.identity
        self._adapter = {"uncond": identity.adapter(resampler(rows.nobody))}
        self._adapter["text"] = identity.adapter(resampler(rows.features))

    def predictions(self, x: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """All rows of guidance by their names, float32."""
        found = {}
        for kind in ("shared", "plain"):  # the encoder's pass may tell the prompt
            predicted = self._predict(x, timestep, ("uncond", "text"), shared=kind == "shared").float().chunk(2)
            found |= {f"{kind}_{prompt}": row for prompt, row in zip(("uncond", "text"), predicted)}
        return found

    def shared_text(self, x: Tensor, timestep: Tensor) -> Tensor:
        """The one row under the LCM LoRA."""
        return self._predict(x, timestep, ("text",), shared=True, preview=1.0)

    def _predict(
        self, x: Tensor, timestep: Tensor, prompts: Collection[str], *, shared: bool, preview: float = 0.0
    ) -> Tensor:
        identity, count = self._loaded.identity, len(prompts)
        timesteps = timestep.expand(count)
        reference = None
        if shared:
            seen = self._rows.reference
            if self._config.noisy_reference:
                seen = self._loaded.schedule.add_noise(seen, self._start, timesteps[:1])
            told = Conditioning.join(*(self._reference_prompts[prompt] for prompt in prompts))
            middle: list[Tensor] = []
            reference = identity.encode(seen.expand(count, -1, -1, -1), timesteps, told, middle=middle)
            if self._tell is not None:
                self._prompts["text"] = self._tell(middle[0][-1:])
        return identity.predict(
            x.expand(count, -1, -1, -1),
            timesteps,
            Conditioning.join(*(self._prompts[prompt] for prompt in prompts)),
            adapter=_joined([self._adapter[prompt] for prompt in prompts]),
            adapter_scale=self._config.adapter_scale,
            reference=reference,
            preview=preview,
        )


def _joined(parts: list[KeysValues]) -> KeysValues:
    return {block: tuple(map(torch.cat, zip(*(part[block] for part in parts)))) for block in parts[0]}
