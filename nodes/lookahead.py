"""LCM-Lookahead nodes: sample with a face encoder and the identity it made."""

from typing import get_args

from comfy_api.latest import io

from . import _sampling_inputs, _sockets
from ._choices import first_refusal, known
from .guiding import sample_latent
from .lookahead_guider import LookaheadGuider, Mode, ReferenceNoise


def _sockets_of_a_person() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="An SDXL model. LoRAs, ControlNets and FreeU may come before."),
        _sockets.Encoder.Input("encoder", tooltip="From Load Lookahead Encoder."),
        _sockets.Identity.Input("identity", tooltip="From Encode Identity or Load Identity."),
        io.Conditioning.Input(
            "positive", tooltip="What the picture shows, such as 'an oil painting of a face'. It need not name anyone."
        ),
        io.Conditioning.Input(
            "negative",
            tooltip="What the picture should not show. The authors leave it empty: a prompt through "
            "ConditioningZeroOut.",
        ),
    ]


def _strength(name: str, tooltip: str) -> io.Input:
    return io.Float.Input(name, default=1.0, min=0.0, max=3.0, step=0.01, tooltip=tooltip)


def _settings() -> list[io.Input]:
    return [
        io.Combo.Input(
            "mode",
            options=list(get_args(Mode)),
            default=get_args(Mode)[0],
            tooltip="attention sharing: the picture also looks at the reference, closest likeness, three times the "
            "work. adapter only: as fast as plain sampling; full and identity scale have no effect.",
        ),
        _sampling_inputs.scale(
            "text_scale", 3.0, "Guidance (CFG) by the prompt. With adapter only, 5 is the authors' value."
        ),
        _sampling_inputs.scale(
            "full_scale",
            2.0,
            "Guidance by prompt and reference together. Where no attention is shared it adds to the text scale.",
        ),
        _sampling_inputs.scale(
            "identity_scale", 2.0, "Guidance by the reference without the prompt. Higher is more alike and less free."
        ),
        _strength("adapter_scale", "How strongly the identity's tokens act in cross-attention. 0 is off."),
        _strength(
            "sharing_strength", "How much attention sees of the reference: 1 as trained, 0 is off and costs nothing."
        ),
        *_sampling_inputs.percents(
            "attention is shared. 0 is from the start.",
            "attention is no longer shared. Steps outside the range cost a third.",
        ),
        io.Combo.Input(
            "reference_noise",
            options=list(get_args(ReferenceNoise)),
            default=get_args(ReferenceNoise)[0],
            tooltip="The reference is noised as much as the picture: with each picture's own starting noise (the "
            "authors), with the first picture's for the whole batch (one encoder pass serves all), or not at all.",
        ),
        io.Boolean.Input(
            "few_step",
            default=False,
            tooltip="For LCM and other models distilled to a few steps: one prediction and no guidance.",
        ),
        _sampling_inputs.rescale("the text's"),
    ]


def _optional() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "encoder_prompt",
            optional=True,
            tooltip="What the reference picture shows. The authors use 'A photo of a face'. Without it the positive "
            "prompt.",
        ),
        io.Mask.Input(
            "region",
            optional=True,
            tooltip="Where in the picture the identity may act. White is everywhere; grey is weaker.",
        ),
    ]


class LookaheadGuiderNode(io.ComfyNode):
    """A guider for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLookaheadGuider",
            display_name="Lookahead Guider",
            category="personalize/lookahead",
            description="Gives a picture the identity of a face, with separate scales for the prompt and for the "
            "likeness (arXiv 2404.03620). For Sampler Custom Advanced.",
            inputs=[*_sockets_of_a_person(), *_settings(), *_optional()],
            outputs=[io.Guider.Output(display_name="guider")],
        )

    @classmethod
    def validate_inputs(cls, mode=None, reference_noise=None) -> bool | str:
        return _known_choices(mode, reference_noise)

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        return io.NodeOutput(LookaheadGuider(model, **settings))


class KSamplerLookahead(io.ComfyNode):
    """KSampler with the lookahead guider inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeKSamplerLookahead",
            display_name="KSampler (Lookahead)",
            category="personalize/lookahead",
            description="KSampler that gives a picture the identity of a face.",
            inputs=[
                *_sockets_of_a_person(),
                _sampling_inputs.seed(),
                _sampling_inputs.steps(30),
                *_sampling_inputs.algorithm("dpmpp_2m", "sgm_uniform", " dpmpp_2m is the authors'."),
                *_sampling_inputs.latent(),
                *_settings(),
                *_optional(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def validate_inputs(cls, mode=None, reference_noise=None, sampler_name=None, scheduler=None) -> bool | str:
        return first_refusal(
            (_known_choices(mode, reference_noise), _sampling_inputs.known_algorithm(sampler_name, scheduler))
        )

    @classmethod
    def execute(cls, model, seed, steps, sampler_name, scheduler, latent_image, denoise, **settings) -> io.NodeOutput:
        guider = LookaheadGuider(model, **settings)
        latent = sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise)
        return io.NodeOutput(latent)


def _known_choices(mode: str | None, reference_noise: str | None) -> bool | str:
    checks = (("mode", mode, Mode), ("reference noise", reference_noise, ReferenceNoise))
    return first_refusal(known(kind, value, get_args(choices)) for kind, value, choices in checks)
