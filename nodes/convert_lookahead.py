"""A slim encoder out of the LCM-Lookahead authors' checkpoint."""

from pathlib import Path

from comfy_api.latest import io
from torch import Tensor

from ..models.errors import IncompatibleModelError
from ..models.families import SDXL
from ..models.formats import describe, refuse_taken, safe_name
from ..models.lookahead.convert import ConversionReport, convert_checkpoint
from ..models.lookahead.encoder import FORMAT, write_encoder
from ..models.mapped import map_weights
from . import _host, _sockets, _trainer
from ._choices import first_refusal, known
from ._folders import ENCODERS

NO_BASE = "none"


class ConvertLookaheadCheckpoint(io.ComfyNode):
    """Keep of a model_ckpt.pt what training changed, and check that the rest is the base model's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeConvertLookaheadCheckpoint",
            display_name="Convert Lookahead Checkpoint",
            category="personalize/lookahead",
            description="Takes the face encoder out of the LCM-Lookahead authors' model_ckpt.pt: 0.9 GB instead of 15, "
            "without what SDXL has already. Compares the rest with a base model and says what it found.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=_checkpoints(),
                    tooltip="The authors' checkpoint, in models/lookahead_encoders. Nothing in it can run code.",
                ),
                io.Combo.Input(
                    "ckpt_name",
                    options=[NO_BASE, *_host.model_files("checkpoints")],
                    default=NO_BASE,
                    tooltip="SDXL checkpoint to compare the encoder's frozen weights with; none skips the comparison.",
                ),
                io.String.Input(
                    "output_name", default="lookahead_encoder", tooltip="Name of the new file, without ending."
                ),
                _trainer.OVERWRITE,
            ],
            outputs=[
                _sockets.Name.Output(display_name="encoder_name"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def validate_inputs(cls, output_name=None, encoder_name=None, ckpt_name=None) -> bool | str:
        return first_refusal(
            [
                _trainer.check_output_name(output_name),
                known("checkpoint of an encoder", encoder_name, _checkpoints()),
                known("checkpoint", ckpt_name, [NO_BASE, *_host.model_files("checkpoints")]),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name=None, ckpt_name=None, **_others) -> str:
        base = None if ckpt_name in (None, NO_BASE) else _host.find_model_file("checkpoints", ckpt_name)
        return _host.file_version(_host.find_model_file(ENCODERS, encoder_name) if encoder_name else None, base)

    @classmethod
    def execute(cls, encoder_name, ckpt_name, output_name, overwrite=False) -> io.NodeOutput:
        with _host.memory_given_back(), _host.leave_inference_mode(), _host.short_paths():
            written, report = cls._convert(encoder_name, ckpt_name, output_name, overwrite)
        return io.NodeOutput(written.name, str(report), ui={"text": [f"saved {written.name}", str(report)]})

    @classmethod
    def _convert(cls, encoder_name, ckpt_name, output_name, overwrite) -> tuple[Path, ConversionReport]:
        name = safe_name(output_name)
        path = _host.save_folder(ENCODERS) / f"{name}.safetensors"
        refuse_taken(path, overwrite=overwrite)  # before gigabytes are read
        source = _host.model_path(ENCODERS, encoder_name)
        base = None if ckpt_name == NO_BASE else _base_unet(_host.model_path("checkpoints", ckpt_name))
        progress = _host.HostProgress(cls.hidden.unique_id)

        def step(done: int, total: int) -> None:
            progress.report(done, total, f"converting {source.name}" if done < total else "")
            progress.raise_if_cancelled()

        encoder, report = convert_checkpoint(source, base, step)
        metadata = describe(
            FORMAT,
            family=SDXL.name,
            method="lookahead",
            title=name,
            kind="lookahead-encoder",
            extra={"personalize.converted_from": source.name} | _trainer.origin_metadata(cls.hidden),
        )
        return write_encoder(path, encoder, metadata, overwrite=overwrite), report


def _checkpoints() -> list[str]:
    """Files that may hold the authors' checkpoint; what they saved is a pickle."""
    return [name for name in _host.model_files(ENCODERS) if not name.lower().endswith(".safetensors")]


def _base_unet(path: Path) -> dict[str, Tensor]:
    """UNet of a single-file SDXL checkpoint by diffusers' names, as views of the file."""
    from ..trainers.modules import missing_weights_named
    from ..trainers.single_file import UNET, unet_component
    from ..trainers.weights import Weights

    tensors, _ = map_weights(path)
    if f"{UNET}label_emb.0.0.weight" not in tensors:
        raise IncompatibleModelError(
            f"{path.name}: found no SDXL model; choose the SDXL checkpoint that the encoder was trained on, or "
            f"{NO_BASE}"
        )
    weights = Weights((path,), {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with missing_weights_named(path.name):
        component = unet_component(weights, SDXL)
        return component.convert({name: tensors[name] for name in component.names})
