"""The Perfusion trainer node, and the one that estimates the covariance it needs."""

import comfy.model_management
from comfy_api.latest import io

from ..models.errors import ConfigError, DatasetError
from ..models.perfusion import read_covariance
from ..trainers.perfusion.config import NO_COVARIANCE, PerfusionConfig
from ..trainers.perfusion.covariance_config import CovarianceConfig
from . import _host, _input_folder, _sockets, _trainer
from ._choices import first_refusal, known, known_settings
from ._folders import CONCEPTS, COVARIANCES

NO_FILE = "(none)"
# Append only: workflows store widget values by position.
_SETTINGS = (
    "steps", "learning_rate", "embedding_learning_rate", "batch_size", "gradient_accumulation", "resolution",
    "precision", "gradient_checkpointing", "beta", "tau", "ema_decay", "output_mode", "prompts", "templates",
    "masked_loss", "crop", "crop_variants", "flip", "optimizer", "lr_schedule", "warmup_steps", "weight_decay",
    "max_grad_norm", "snr_gamma", "offset_noise", "seed", "keep", "save_precision", "preview_every",
    "preview_prompt", "preview_steps", "preview_guidance", "checkpoint_every", "checkpoint_limit", "resume",
)  # fmt: skip


class TrainPerfusion(io.ComfyNode):
    """Teach one concept in a small file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeTrainPerfusion",
            display_name="Train Perfusion",
            category="personalize/training",
            description="Trains one concept by key-locked rank-one editing (arXiv 2305.01644): a file of about "
            "40 KB, or 200 KB for SDXL, that can be combined with others when sampling.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                _sockets.Base.Input("base", tooltip="From Load Training Base."),
                _sockets.Dataset.Input(
                    "dataset",
                    tooltip="From Personalization Dataset, with one token whose initializer is the superclass, and "
                    "with masks where only the subject is to be learned.",
                ),
                io.Combo.Input(
                    "covariance_name",
                    options=[NO_FILE, *_host.model_files(COVARIANCES)],
                    default=NO_FILE,
                    tooltip="Covariance of the base model's text encodings, from Estimate Text Covariance, or the "
                    "authors' C_inv.npy. Concepts can only be combined when they were trained on the same.",
                ),
                io.String.Input(
                    "output_name",
                    default="my_concept",
                    tooltip="Name of the concept file. It appears in Load Perfusion Concept after pressing R.",
                ),
                *_trainer.widgets(PerfusionConfig, *_SETTINGS, gradient_checkpointing=True, preview_every=100),
                _trainer.OVERWRITE,
                _trainer.STOPPING,
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="concept_name",
                    tooltip="Name of the trained file; connect it to Load Perfusion Concept's concept_name.",
                ),
                *_trainer.OUTPUTS[1:],
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        covariance_name=None,
        output_name=None,
        precision=None,
        output_mode=None,
        prompts=None,
        crop=None,
        optimizer=None,
        lr_schedule=None,
        keep=None,
        save_precision=None,
    ) -> bool | str:
        chosen = {"precision": precision, "output_mode": output_mode, "prompts": prompts, "crop": crop}
        chosen |= {"optimizer": optimizer, "lr_schedule": lr_schedule, "keep": keep, "save_precision": save_precision}
        return first_refusal(
            [
                NO_COVARIANCE if covariance_name == NO_FILE else True,
                known("covariance", covariance_name, _host.model_files(COVARIANCES)),
                _trainer.check_output_name(output_name),
                known_settings(PerfusionConfig, **chosen),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, covariance_name=None, **_others) -> str:
        return _host.model_version(COVARIANCES, covariance_name)

    @classmethod
    def execute(
        cls, base, dataset, covariance_name, output_name, overwrite=False, stopping=None, **settings
    ) -> io.NodeOutput:
        _trainer.refuse_unknown(cls, settings, _SETTINGS)
        if covariance_name == NO_FILE:
            raise ConfigError(NO_COVARIANCE)
        config = PerfusionConfig(**settings)
        with _host.short_paths():
            covariance = read_covariance(_host.model_path(COVARIANCES, covariance_name))
        place = _trainer.output_place(output_name, overwrite, CONCEPTS)
        from ..trainers.perfusion.train import train

        def run(**surroundings):
            return train(config, base, dataset, covariance, place, stopping=stopping, **surroundings)

        return _trainer.run_training(cls, run)


class EstimateTextCovariance(io.ComfyNode):
    """The covariance of a base model's text encodings, from a file of captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEstimateTextCovariance",
            display_name="Estimate Text Covariance",
            category="personalize/training",
            description="Measures how the text encodings of a base model vary over many captions, once for each model "
            "family. Train Perfusion needs the file, and concepts that are to be combined need the same one.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[  # append only: workflows store widget values by position
                _sockets.Base.Input("base", tooltip="From Load Training Base: SD1.5, SD2.1 or SDXL."),
                io.Combo.Input(
                    "captions_file",
                    options=_input_folder.text_files(),
                    tooltip="A text file in ComfyUI's input folder, one caption per line. The authors take 100,000 of "
                    "LAION's.",
                ),
                io.String.Input("output_name", default="text_covariance", tooltip="Name of the covariance file."),
                *_trainer.widgets(CovarianceConfig, "captions", "batch_size", "precision", "save_every", "resume"),
                _trainer.OVERWRITE,
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="covariance_name",
                    tooltip="Name of the file; connect it to Train Perfusion's covariance_name.",
                ),
                io.Int.Output(display_name="captions", tooltip="Captions that went into it."),
                io.String.Output(display_name="summary", tooltip="What was done, in one line."),
            ],
        )

    @classmethod
    def validate_inputs(cls, captions_file=None, output_name=None, precision=None) -> bool | str:
        if captions_file is not None:
            try:
                _input_folder.text_path(str(captions_file))
            except DatasetError as error:
                return str(error)
        return first_refusal(
            [_trainer.check_output_name(output_name), known_settings(CovarianceConfig, precision=precision)]
        )

    @classmethod
    def fingerprint_inputs(cls, captions_file=None, **_others) -> str:
        try:
            return _host.file_version(_input_folder.text_path(captions_file)) if captions_file else ""
        except DatasetError:
            return ""

    @classmethod
    def execute(cls, base, captions_file, output_name, overwrite=False, **settings) -> io.NodeOutput:
        config = CovarianceConfig(**settings)
        place = _trainer.output_place(output_name, overwrite, COVARIANCES)
        from ..trainers.perfusion.covariance import estimate

        progress = _host.HostProgress(cls.hidden.unique_id)
        with _host.memory_given_back(), _host.leave_inference_mode(), _host.short_paths():
            result = estimate(
                config,
                base,
                _input_folder.text_path(captions_file),
                place,
                device=comfy.model_management.get_torch_device(),
                progress=progress,
                metadata=_trainer.origin_metadata(cls.hidden),
                before_loading=_host.free_vram,
            )
        progress.raise_if_cancelled()
        return io.NodeOutput(result.file.name, result.captions, result.summary, ui={"text": [result.summary]})
