"""The trainer nodes of the methods that DVAR was made for: Textual Inversion, DreamBooth-LoRA, Custom Diffusion."""

from comfy_api.latest import io

from ..models.errors import ConfigError
from ..trainers.dvar.config import CustomDiffusionConfig, DreamBoothConfig, TextualInversionConfig
from . import _sockets, _trainer
from ._choices import first_refusal, known_settings
from ._folders import CUSTOM_DIFFUSIONS

# Append only: workflows store widget values by position.
_FIRST = ("steps", "learning_rate", "prompts", "class_word")
_LAST = (
    "batch_size", "gradient_accumulation", "resolution", "precision", "gradient_checkpointing", "scale_learning_rate",
    "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "snr_gamma", "offset_noise", "crop",
    "crop_variants", "flip", "seed", "keep", "preview_every", "preview_prompt", "preview_steps", "preview_guidance",
    "checkpoint_every", "checkpoint_limit", "resume",
)  # fmt: skip
_TEXTUAL_INVERSION = (*_FIRST, *_LAST)
_CUSTOM_DIFFUSION = (
    *_FIRST, "prior_loss_weight", "rescale_variants", *(name for name in _LAST if name != "snr_gamma"), "optimizer",
    "save_precision", "save_authors_file",
)  # fmt: skip
_DREAMBOOTH = (*_FIRST, "rank", "prior_loss_weight", *_LAST, "optimizer", "save_precision", "bundle_tokens")


def _inputs(config: type, settings: tuple[str, ...], output_name: io.Input, **defaults) -> list[io.Input]:
    return [
        _sockets.Base.Input("base", tooltip="From Load Training Base."),
        _sockets.Dataset.Input("dataset", tooltip="From Personalization Dataset."),
        output_name,
        *_trainer.widgets(config, *settings, gradient_checkpointing=True, preview_every=250, **defaults),
        _trainer.OVERWRITE,
        _sockets.Stopping.Input(
            "stopping",
            optional=True,
            tooltip="A rule that ends the training: Stop: DVAR with the preset of this method.",
        ),
    ]


def _refuse_unknown(node: str, given: dict, known: tuple[str, ...]) -> None:
    if unknown := given.keys() - set(known):
        raise ConfigError(f"unknown setting(s) {', '.join(sorted(unknown))} of {node}; remove them")


class TrainTextualInversion(io.ComfyNode):
    """Teach a word, and leave the model as it is."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainTextualInversion",
            display_name="Train Textual Inversion",
            category="personalize/training",
            description="Trains new words for a few pictures and nothing else: a file of some kilobytes that works as "
            "embedding:name in any prompt. Connect Stop: DVAR to end it when it has converged.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=_inputs(
                TextualInversionConfig,
                _TEXTUAL_INVERSION,
                io.String.Input(
                    "output_name",
                    default="my_dog",
                    tooltip="Name of the embedding file. It appears in the lists after pressing R.",
                ),
            ),
            outputs=[
                io.Custom("COMBO,STRING").Output(
                    display_name="embedding_name",
                    tooltip="Name of the trained file; connect it to Load Learned Tokens' embedding_name.",
                ),
                *_trainer.OUTPUTS[1:],
            ],
        )

    @classmethod
    def validate_inputs(
        cls, output_name=None, prompts=None, precision=None, lr_schedule=None, crop=None, keep=None
    ) -> bool | str:
        chosen = {"prompts": prompts, "precision": precision, "lr_schedule": lr_schedule, "crop": crop, "keep": keep}
        return first_refusal(
            [_trainer.check_output_name(output_name), known_settings(TextualInversionConfig, **chosen)]
        )

    @classmethod
    def execute(cls, base, dataset, output_name, overwrite=False, stopping=None, **settings) -> io.NodeOutput:
        _refuse_unknown("Train Textual Inversion", settings, _TEXTUAL_INVERSION)
        config = TextualInversionConfig(**settings)
        place = _trainer.output_place(output_name, overwrite)
        from ..trainers.dvar.textual_inversion import train

        def run(**surroundings):
            return train(config, base, dataset, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)


class TrainDreamBoothLoRA(io.ComfyNode):
    """Teach a LoRA, and words if there are any."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainDreamBoothLoRA",
            display_name="Train DreamBooth LoRA",
            category="personalize/training",
            description="Trains a LoRA, and new words if the dataset has any, with the plain loss; class pictures keep "
            "what the class looks like. Connect Stop: DVAR to end it when it has converged.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=_inputs(DreamBoothConfig, _DREAMBOOTH, _trainer.OUTPUT_NAME),
            outputs=_trainer.OUTPUTS,
        )

    @classmethod
    def validate_inputs(
        cls,
        output_name=None,
        prompts=None,
        precision=None,
        lr_schedule=None,
        crop=None,
        keep=None,
        optimizer=None,
        save_precision=None,
    ) -> bool | str:
        chosen = {"prompts": prompts, "precision": precision, "lr_schedule": lr_schedule, "crop": crop, "keep": keep}
        chosen |= {"optimizer": optimizer, "save_precision": save_precision}
        return first_refusal([_trainer.check_output_name(output_name), known_settings(DreamBoothConfig, **chosen)])

    @classmethod
    def execute(cls, base, dataset, output_name, overwrite=False, stopping=None, **settings) -> io.NodeOutput:
        _refuse_unknown("Train DreamBooth LoRA", settings, _DREAMBOOTH)
        config = DreamBoothConfig(**settings)
        place = _trainer.output_place(output_name, overwrite)
        from ..trainers.dvar.dreambooth import train

        def run(**surroundings):
            return train(config, base, dataset, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)


class TrainCustomDiffusion(io.ComfyNode):
    """Teach keys and values of cross-attention, and words if there are any."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainCustomDiffusion",
            display_name="Train Custom Diffusion",
            category="personalize/training",
            description="Trains how the model reads prompts, the keys and values of its cross-attention, and new "
            "words. Best with class pictures. Load the file with Load Custom Diffusion.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=_inputs(
                CustomDiffusionConfig,
                _CUSTOM_DIFFUSION,
                io.String.Input(
                    "output_name",
                    default="my_dog",
                    tooltip="Name of the file in models/custom_diffusion and of the embedding file.",
                ),
            ),
            outputs=[
                io.Custom("COMBO,STRING").Output(
                    display_name="custom_name",
                    tooltip="Name of the trained file; connect it to Load Custom Diffusion's custom_name.",
                ),
                *_trainer.OUTPUTS[1:],
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        output_name=None,
        prompts=None,
        precision=None,
        lr_schedule=None,
        crop=None,
        keep=None,
        optimizer=None,
        save_precision=None,
    ) -> bool | str:
        chosen = {"prompts": prompts, "precision": precision, "lr_schedule": lr_schedule, "crop": crop, "keep": keep}
        chosen |= {"optimizer": optimizer, "save_precision": save_precision}
        return first_refusal([_trainer.check_output_name(output_name), known_settings(CustomDiffusionConfig, **chosen)])

    @classmethod
    def execute(cls, base, dataset, output_name, overwrite=False, stopping=None, **settings) -> io.NodeOutput:
        _refuse_unknown("Train Custom Diffusion", settings, _CUSTOM_DIFFUSION)
        config = CustomDiffusionConfig(**settings)
        place = _trainer.output_place(output_name, overwrite, CUSTOM_DIFFUSIONS)
        from ..trainers.dvar.custom_diffusion import train

        def run(**surroundings):
            return train(config, base, dataset, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)
