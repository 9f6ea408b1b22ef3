"""The trainer nodes of the methods that DVAR was made for: Textual Inversion, DreamBooth-LoRA, Custom Diffusion."""

from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..trainers.dvar.config import CustomDiffusionConfig, DreamBoothConfig, MethodConfig, TextualInversionConfig
from . import _sockets, _trainer
from ._choices import first_refusal, known_settings
from ._folders import CUSTOM_DIFFUSIONS

# Append only: workflows store widget values by position. What came later stands behind overwrite.
_FIRST = ("steps", "learning_rate", "prompts", "class_word")
_LAST = (
    "batch_size", "gradient_accumulation", "resolution", "precision", "gradient_checkpointing", "scale_learning_rate",
    "lr_schedule", "warmup_steps", "weight_decay", "max_grad_norm", "snr_gamma", "offset_noise", "crop",
    "crop_variants", "flip", "seed", "keep", "preview_every", "preview_prompt", "preview_steps", "preview_guidance",
    "checkpoint_every", "checkpoint_limit", "resume",
)  # fmt: skip
_CLASS = ("class_pictures", "class_prompt", "class_steps")


class _TrainMethod(io.ComfyNode):
    """What the three nodes have in common; each names its settings and its recipe."""

    CONFIG: type[MethodConfig]
    SETTINGS: tuple[str, ...]
    LATER_SETTINGS: tuple[str, ...]
    FOLDER = "loras"
    """Of the host, for what is saved besides embeddings."""
    recipe: Callable[[], Callable[..., Any]]
    """Imports the training when it is asked for."""

    @classmethod
    def schema(
        cls, *, output_name: io.Input = _trainer.OUTPUT_NAME, trained: io.Output = _trainer.OUTPUTS[0], **texts: str
    ) -> io.Schema:
        """The schema, given the name's widget, the first output, and id, display name and description."""
        defaults = {"gradient_checkpointing": True, "preview_every": 250}
        return io.Schema(
            category="personalize/training",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                _sockets.Base.Input("base", tooltip="From Load Training Base."),
                _sockets.Dataset.Input("dataset", tooltip="From Personalization Dataset."),
                output_name,
                *_trainer.widgets(cls.CONFIG, *cls.SETTINGS, **defaults),
                _trainer.OVERWRITE,
                _sockets.Stopping.Input(
                    "stopping",
                    optional=True,
                    tooltip="A rule that ends the training: Stop: DVAR with the preset of this method.",
                ),
                *(_trainer.optional(widget) for widget in _trainer.widgets(cls.CONFIG, *cls.LATER_SETTINGS)),
            ],
            outputs=[trained, *_trainer.OUTPUTS[1:]],
            **texts,
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
        trained=None,
    ) -> bool | str:
        chosen = {"prompts": prompts, "precision": precision, "lr_schedule": lr_schedule, "crop": crop, "keep": keep}
        chosen |= {"optimizer": optimizer, "save_precision": save_precision, "trained": trained}
        given = {name: value for name, value in chosen.items() if value is not None}
        return first_refusal([_trainer.check_output_name(output_name), known_settings(cls.CONFIG, **given)])

    @classmethod
    def execute(cls, base, dataset, output_name, overwrite=False, stopping=None, **settings) -> io.NodeOutput:
        _trainer.refuse_unknown(cls, settings, (*cls.SETTINGS, *cls.LATER_SETTINGS))
        config = cls.CONFIG(**settings)
        place = _trainer.output_place(output_name, overwrite, cls.FOLDER)
        train = cls.recipe()

        def run(**surroundings):
            return train(config, base, dataset, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)


class TrainTextualInversion(_TrainMethod):
    """Teach a word, and leave the model as it is."""

    CONFIG = TextualInversionConfig
    SETTINGS = (*_FIRST, *_LAST)
    LATER_SETTINGS = ("optimizer", "sam_rho")

    @staticmethod
    def recipe():
        from ..trainers.dvar.textual_inversion import train

        return train

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="PersonalizeTrainTextualInversion",
            display_name="Train Textual Inversion",
            description="Trains new words for a few pictures and nothing else: a file of some kilobytes that works as "
            "embedding:name in any prompt. Connect Stop: DVAR to end it when it has converged.",
            output_name=io.String.Input(
                "output_name",
                default="my_dog",
                tooltip="Name of the embedding file. It appears in the lists after pressing R.",
            ),
            trained=_sockets.Name.Output(
                display_name="embedding_name",
                tooltip="Name of the trained file; connect it to Load Learned Tokens' embedding_name.",
            ),
        )


class TrainDreamBoothLoRA(_TrainMethod):
    """Teach a LoRA, and words if there are any."""

    CONFIG = DreamBoothConfig
    SETTINGS = (*_FIRST, "rank", "prior_loss_weight", *_LAST, "optimizer", "save_precision", "bundle_tokens")
    LATER_SETTINGS = (*_CLASS, "sam_rho")

    @staticmethod
    def recipe():
        from ..trainers.dvar.dreambooth import train

        return train

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="PersonalizeTrainDreamBoothLoRA",
            display_name="Train DreamBooth LoRA",
            description="Trains a LoRA, and new words if the dataset has any, with the plain loss; class pictures keep "
            "what the class looks like. Connect Stop: DVAR to end it when it has converged.",
        )


class TrainCustomDiffusion(_TrainMethod):
    """Teach weights of cross-attention, and words if there are any."""

    CONFIG = CustomDiffusionConfig
    SETTINGS = (
        *_FIRST, "prior_loss_weight", "rescale_variants", *(name for name in _LAST if name != "snr_gamma"),
        "optimizer", "save_precision", "save_authors_file",
    )  # fmt: skip
    LATER_SETTINGS = ("trained", "kept_share", *_CLASS, "sam_rho")
    FOLDER = CUSTOM_DIFFUSIONS

    @staticmethod
    def recipe():
        from ..trainers.dvar.custom_diffusion import train

        return train

    @classmethod
    def define_schema(cls) -> io.Schema:
        return cls.schema(
            node_id="PersonalizeTrainCustomDiffusion",
            display_name="Train Custom Diffusion",
            description="Trains how the model reads prompts, the keys and values of its cross-attention, and new "
            "words. Best with class pictures. Load the file with Load Custom Diffusion.",
            output_name=io.String.Input(
                "output_name",
                default="my_dog",
                tooltip="Name of the file in models/custom_diffusion and of the embedding file.",
            ),
            trained=_sockets.Name.Output(
                display_name="custom_name",
                tooltip="Name of the trained file; connect it to Load Custom Diffusion's custom_name.",
            ),
        )
