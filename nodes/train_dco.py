"""The DCO trainer node."""

from comfy_api.latest import io

from ..trainers.dco.config import DCOConfig
from . import _sockets, _trainer
from ._choices import first_refusal, known_settings

# Append only: workflows store widget values by position.
_SETTINGS = (
    "steps", "learning_rate", "text_learning_rate", "beta", "rank", "batch_size", "gradient_accumulation",
    "resolution", "precision", "gradient_checkpointing", "optimizer", "lr_schedule", "warmup_steps",
    "weight_decay", "max_grad_norm", "snr_gamma", "offset_noise", "prior_loss_weight", "train_text_encoder",
    "crop", "crop_variants", "flip", "seed", "keep", "save_precision", "bundle_tokens", "preview_every",
    "preview_prompt", "preview_steps", "preview_guidance", "checkpoint_every", "checkpoint_limit", "resume",
)  # fmt: skip


class TrainDCO(io.ComfyNode):
    """Teach a subject or a style with the Direct Consistency loss."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainDCO",
            display_name="Train DCO",
            category="personalize/training",
            description="Trains a LoRA and new words on a few captioned pictures with Direct Consistency "
            "Optimization, which keeps what the base model can do. The files work in any LoRA loader, and best with "
            "Reward Guider.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                _sockets.Base.Input("base", tooltip="From Load Training Base."),
                _sockets.Dataset.Input("dataset", tooltip="From Personalization Dataset."),
                _trainer.OUTPUT_NAME,
                *_trainer.widgets(DCOConfig, *_SETTINGS, steps=2000, gradient_checkpointing=True, preview_every=250),
                _trainer.OVERWRITE,
                _trainer.STOPPING,
            ],
            outputs=_trainer.OUTPUTS,
        )

    @classmethod
    def validate_inputs(
        cls,
        output_name=None,
        optimizer=None,
        lr_schedule=None,
        precision=None,
        crop=None,
        keep=None,
        save_precision=None,
    ) -> bool | str:
        chosen = {"optimizer": optimizer, "lr_schedule": lr_schedule, "precision": precision, "crop": crop}
        chosen |= {"keep": keep, "save_precision": save_precision}
        return first_refusal([_trainer.check_output_name(output_name), known_settings(DCOConfig, **chosen)])

    @classmethod
    def execute(cls, base, dataset, output_name, overwrite=False, stopping=None, **settings) -> io.NodeOutput:
        _trainer.refuse_unknown(cls, settings, _SETTINGS)
        config = DCOConfig(**settings)
        place = _trainer.output_place(output_name, overwrite)
        from ..trainers.dco.train import train

        def run(**surroundings):
            return train(config, base, dataset, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)
