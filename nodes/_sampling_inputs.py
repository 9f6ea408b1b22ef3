"""What our samplers share with the host's KSampler: the same widgets, under the same names."""

from typing import Any

import comfy.samplers
from comfy_api.latest import io

from ._choices import first_refusal, known


def seed(advice: str = "") -> io.Input:
    """Of the starting noise; the page draws a new one after every run.

    Args:
        advice: more about the noise, after a comma.
    """
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip=f"Random seed of the starting noise{advice}.",
    )


def steps(default: int) -> io.Input:
    return io.Int.Input("steps", default=default, min=1, max=10000, tooltip="Number of denoising steps.")


def scale(name: str, default: float, tooltip: str, *, optional: bool = False) -> io.Input:
    """How strongly a guidance acts."""
    return io.Float.Input(name, default=default, min=0.0, max=100.0, step=0.1, tooltip=tooltip, optional=optional)


def rescale(towards: str) -> io.Input:
    """What tames high scales.

    Args:
        towards: whose contrast is wanted, to follow "towards".
    """
    return io.Float.Input(
        "rescale",
        default=0.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip=f"Brings the contrast of the guided prediction back towards {towards}; try 0.7 when high scales burn "
        "the picture. 0 is off.",
    )


def algorithm(sampler: str | None = None, scheduler: str | None = None, advice: str = "") -> list[io.Input]:
    """Sampler and scheduler; without defaults the host's first ones.

    Args:
        advice: more about the sampler, after a space.
    """
    kinds = comfy.samplers.KSampler
    return [
        io.Combo.Input(
            "sampler_name", options=kinds.SAMPLERS, tooltip=f"The sampling algorithm.{advice}", **_default(sampler)
        ),
        io.Combo.Input(
            "scheduler", options=kinds.SCHEDULERS, tooltip="How the noise level falls.", **_default(scheduler)
        ),
    ]


def _default(choice: str | None) -> dict[str, Any]:
    return {} if choice is None else {"default": choice}


def latent() -> list[io.Input]:
    """The latent image, and how much of it is denoised."""
    return [
        io.Latent.Input("latent_image", tooltip="The latent to denoise; its inpainting mask is respected."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Below 1 keeps part of the latent's structure, for image to image.",
        ),
    ]


def percents(start: str, end: str, last: float = 1.0) -> list[io.Input]:
    """Where in the denoising something acts.

    Args:
        start, end: what happens there, to follow "Part of the denoising after which".
        last: where it ends unless the user says otherwise.
    """
    told = (("start_percent", 0.0, start), ("end_percent", last, end))
    return [
        io.Float.Input(
            name, default=default, min=0.0, max=1.0, step=0.001, tooltip=f"Part of the denoising after which {what}"
        )
        for name, default, what in told
    ]


def known_algorithm(sampler_name: str | None, scheduler: str | None) -> bool | str:
    """For validate_inputs: True, or the sentence that refuses a sampler or scheduler."""
    kinds = comfy.samplers.KSampler
    return first_refusal(
        (known("sampler", sampler_name, kinds.SAMPLERS), known("scheduler", scheduler, kinds.SCHEDULERS))
    )
