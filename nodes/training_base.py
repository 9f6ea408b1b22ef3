"""The base model that trainings start from, and the rules that end them."""

from comfy_api.latest import io

from ..trainers.stopping import FixedSteps
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


class StopFixed(io.ComfyNode):
    """Train for a fixed number of steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeStopFixed",
            display_name="Stop: Fixed",
            category="personalize/training",
            description="Ends a training after a fixed number of steps.",
            inputs=[
                io.Int.Input(
                    "steps",
                    default=1000,
                    min=1,
                    max=1_000_000,
                    tooltip="Optimizer steps. The DCO authors use 2000 for a subject and 1000 for a style.",
                )
            ],
            outputs=[_sockets.Stopping.Output(display_name="stopping")],
        )

    @classmethod
    def execute(cls, steps) -> io.NodeOutput:
        return io.NodeOutput(FixedSteps(steps))
