"""The base model that trainings start from."""

from comfy_api.latest import io

from . import _host, _sockets
from ._choices import first_refusal, known

BASE_VAE = "(from the checkpoint)"


class LoadTrainingBase(io.ComfyNode):
    """Recognise a checkpoint without loading it; the trainer loads its parts when it needs them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadTrainingBase",
            display_name="Load Training Base",
            category="personalize/training",
            description="Chooses the checkpoint to train on: SD1.5, SD2.1 or SDXL. Nothing is loaded into memory "
            "until a training starts.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=_host.model_files("checkpoints"),
                    tooltip="A single-file checkpoint of SD1.5, SD2.1 or SDXL. Train on a base model or on the "
                    "fine-tune that you are going to sample with.",
                ),
                io.Combo.Input(
                    "vae_name",
                    options=[BASE_VAE, *_host.model_files("vae")],
                    default=BASE_VAE,
                    tooltip="A separate VAE, for checkpoints without a good one.",
                ),
            ],
            outputs=[_sockets.Base.Output(display_name="base"), io.String.Output(display_name="description")],
        )

    @classmethod
    def validate_inputs(cls, ckpt_name=None, vae_name=None) -> bool | str:
        vaes = [BASE_VAE, *_host.model_files("vae")]
        return first_refusal(
            [known("checkpoint", ckpt_name, _host.model_files("checkpoints")), known("VAE", vae_name, vaes)]
        )

    @classmethod
    def fingerprint_inputs(cls, ckpt_name=None, vae_name=None, **_others) -> str:
        paths = [_host.find_model_file("checkpoints", ckpt_name) if ckpt_name else None]
        if vae_name not in (None, BASE_VAE):
            paths.append(_host.find_model_file("vae", vae_name))
        return _host.file_version(*paths)

    @classmethod
    def execute(cls, ckpt_name, vae_name=BASE_VAE) -> io.NodeOutput:
        from ..trainers.base import open_base

        vae = None if vae_name == BASE_VAE else _host.model_path("vae", vae_name)
        path = _host.model_path("checkpoints", ckpt_name)
        base = open_base(path, vae=vae, tokenizer=_host.tokenizer_folder())
        return io.NodeOutput(base, base.label)
