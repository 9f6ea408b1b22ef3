"""DCO nodes: sample with reward guidance, as a guider or a whole sampler."""

from comfy_api.latest import io

from . import _sampling_inputs
from .guiding import sample_latent
from .reward_guidance import RewardGuider
from .switchable_lora import require_unet


def _conditionings() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "personalized",
            tooltip="The prompt with the learned token, such as 'a <dog> playing saxophone'. The LoRA is on here.",
        ),
        io.Conditioning.Input(
            "base",
            tooltip="The same prompt in ordinary words, such as 'a dog playing saxophone'. The LoRA is off here. "
            "Takes over the personalized prompt's ControlNet when it has none.",
        ),
        io.Conditioning.Input("negative", tooltip="What the picture should not show. The LoRA is off here."),
    ]


def _reward_scale() -> io.Input:
    return _sampling_inputs.scale(
        "reward_scale",
        3.0,
        "How strongly to follow what was learned, independently of the text scale. Higher is closer to the subject or "
        "style, lower follows the prompt more freely; 0 ignores the LoRA and costs nothing.",
    )


def _rescale_and_range() -> list[io.Input]:
    return [
        _sampling_inputs.rescale("the base model's"),
        *_sampling_inputs.percents(
            "the reward term sets in. 0 is from the start.",
            "the reward term stops. Steps outside its range cost only two thirds of the time.",
        ),
    ]


def _second() -> list[io.Input]:
    return [
        io.Conditioning.Input(
            "personalized_2",
            optional=True,
            tooltip="With two chained LoRAs: the prompt for the last one alone, with a scale of its own. "
            "'personalized' then uses the LoRAs before it. Not connected: all LoRAs are on in 'personalized'.",
        ),
        _sampling_inputs.scale(
            "reward_scale_2",
            3.0,
            "How strongly to follow the last LoRA of the chain; used only with personalized_2.",
            optional=True,
        ),
    ]


class RewardGuiderNode(io.ComfyNode):
    """A guider for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeRewardGuider",
            display_name="Reward Guider (DCO)",
            category="personalize/dco",
            description="Guides by the text and, separately, by what the LoRA learned (arXiv 2402.12004). "
            "For Sampler Custom Advanced.",
            inputs=[
                io.Model.Input("model", tooltip="A model with one or more LoRAs from Load DCO LoRA."),
                *_conditionings(),
                _sampling_inputs.scale(
                    "text_scale", 7.5, "Ordinary guidance (CFG) by the base prompt. 1 leaves out the negative prompt."
                ),
                _reward_scale(),
                *_rescale_and_range(),
                *_second(),
            ],
            outputs=[io.Guider.Output(display_name="guider")],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        require_unet(model)
        return io.NodeOutput(RewardGuider(model, **settings))


class KSamplerRewardGuidance(io.ComfyNode):
    """KSampler with the reward guider inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeKSamplerRewardGuidance",
            display_name="KSampler (Reward Guidance)",
            category="personalize/dco",
            description="KSampler that guides by the text and, separately, by what the LoRA learned.",
            inputs=[
                io.Model.Input("model", tooltip="A model with one or more LoRAs from Load DCO LoRA."),
                _sampling_inputs.seed(),
                _sampling_inputs.steps(20),
                _sampling_inputs.scale(
                    "cfg", 7.5, "Text scale: ordinary guidance by the base prompt. 1 leaves the negative prompt out."
                ),
                _reward_scale(),
                *_sampling_inputs.algorithm(),
                *_conditionings(),
                *_sampling_inputs.latent(),
                *_rescale_and_range(),
                *_second(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The denoised latent.")],
        )

    @classmethod
    def validate_inputs(cls, sampler_name=None, scheduler=None) -> bool | str:
        return _sampling_inputs.known_algorithm(sampler_name, scheduler)

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, latent_image, denoise, **settings
    ) -> io.NodeOutput:
        require_unet(model)
        guider = RewardGuider(model, text_scale=cfg, **settings)
        latent = sample_latent(guider, latent_image, seed, steps, sampler_name, scheduler, denoise)
        return io.NodeOutput(latent)
