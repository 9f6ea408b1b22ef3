"""The same prompts and noise under one gate of a Perfusion concept after the other, and how the pictures score."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.samplers
from PIL import Image
from torch import Tensor

from ..models.errors import ConfigError
from ..models.perfusion.balance import Trial
from ..models.tokens import replace_triggers, split_prompt
from ..trainers.pictures import Picture
from . import _host
from ._lines import lines_of
from .guiding import Conditioning, SigmaRange, sample_latent
from .perfusion_prompts import with_words
from .rank_one_edits import GatedConcept, attach
from .scoring import CLIP_I, CLIP_T, Sitting, scores_by_folder

Gate = tuple[float, float]
"""beta and tau."""


def with_gate(concepts: Sequence[GatedConcept], number: int, gate: Gate) -> tuple[GatedConcept, ...]:
    """The chain with another gate for the concept of that number, counted from 1."""
    beta, tau = gate
    return tuple(
        replace(gated, beta=beta, tau=tau) if place == number else gated for place, gated in enumerate(concepts, 1)
    )


def prompts_of(text: str, concepts: Sequence[GatedConcept], number: int) -> list[str]:
    """The prompts, one per line, with the concepts' words; ConfigError when one does not show the concept."""
    if not 1 <= number <= len(concepts):
        raise ConfigError(
            f"concept {number} is to be tried out, {len(concepts)} are loaded; chain another Load Perfusion Concept, "
            "or choose a smaller number"
        )
    lines = [with_words(line, concepts) for line in lines_of(text)]
    if not lines:
        raise ConfigError("found no prompt, expected at least one line; write a prompt on each line")
    word = concepts[number - 1].concept.trigger
    for line in lines:
        if 0 not in split_prompt(line, [word]):
            raise ConfigError(
                f"the prompt {line!r} does not show the concept; write {{{number}}} or {word} where its word belongs"
            )
    return lines


def in_plain_words(line: str, concepts: Sequence[GatedConcept]) -> str:
    """A prompt with superclass words, which a judge knows, in place of the concepts'."""
    for gated in concepts:
        if not gated.concept.superclass:
            raise ConfigError(
                f"{gated.concept.name} does not say which word it stands in for, so that CLIP cannot be asked for it; "
                "load a file that says it"
            )
    return replace_triggers(line, {gated.concept.trigger: gated.concept.superclass for gated in concepts})


def sweep(
    model,
    chains: Sequence[Sequence[GatedConcept]],
    prompts: Sequence[Conditioning],
    negative: Conditioning,
    latent: dict[str, Any],
    progress: _host.HostProgress,
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
) -> Iterator[Tensor]:
    """Yield what each prompt becomes under each chain, (batch, channels, height, width), chain after chain.

    All run on clones of one MODEL, whose weights stay where they are, and from the same noise. A Cancel takes effect
    after the step that is under way.
    """
    total, done = len(chains) * len(prompts) * steps, 0

    def after_step(step: int, *_latents: Any) -> None:
        progress.report(done + min(step + 1, steps), total, f"picture {done // steps + 1} of {total // steps}")
        progress.raise_if_cancelled()

    for chain in chains:
        guider = comfy.samplers.CFGGuider(attach(model, chain, SigmaRange(0.0, 1.0)))
        guider.set_cfg(cfg)
        for prompt in prompts:
            guider.set_conds(prompt, negative)
            sampled = sample_latent(
                guider, latent, seed, steps, sampler_name, scheduler, denoise=1.0, callback=after_step
            )
            done += steps
            yield sampled["samples"]


def decoded(vae, latents: Tensor) -> list[Image.Image]:
    """Pictures of latents (batch, channels, height, width)."""
    _host.raise_if_interrupted()
    return [Picture.from_tensor(one, "picture").open().rgb for one in _host.image_list([vae.decode(latents)])]


def scored(
    gates: Sequence[Gate],
    made: Sequence[Image.Image],
    real: Sequence[Image.Image],
    asked: Sequence[str],
    judge: Path,
    progress: _host.HostProgress,
) -> list[Trial]:
    """The mean scores of each gate's pictures.

    Args:
        made: the pictures of one gate after the other, as many of each.
        real: the concept's own.
        asked: for each made picture, its prompt in plain words.
        judge: folder of a CLIP.
    """
    total, seen = len(made) + len(real), 0

    def advance(count: int, measure: str) -> None:
        nonlocal seen
        seen += count
        progress.report(seen, total, f"{measure}: {seen} of {total}")
        progress.raise_if_cancelled()

    values = {score.name: score.values for score in scores_by_folder(Sitting(made, real, asked, advance), judge)}
    count = len(made) // len(gates)

    def mean(name: str, place: int) -> float:
        return sum(values[name][place * count : (place + 1) * count]) / count

    return [Trial(*gate, mean(CLIP_I, place), mean(CLIP_T, place)) for place, gate in enumerate(gates)]
