"""An encoder in the layout of the LCM-Lookahead authors' checkpoint."""

from comfy_api.latest import io

from ..models.formats import safe_name
from . import _host, _sockets, _trainer
from ._choices import first_refusal, known
from ._folders import ENCODERS


class ExportLookaheadEncoder(io.ComfyNode):
    """Write a model_ckpt.pt, which the authors' infer.py reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeExportLookaheadEncoder",
            display_name="Export Lookahead Encoder",
            category="personalize/lookahead",
            description="Writes a face encoder as the LCM-Lookahead authors' model_ckpt.pt, with SDXL's UNet and the "
            "image encoder in it, for their own code. ComfyUI itself needs no export.",
            is_output_node=True,
            inputs=[  # append only: workflows store widget values by position
                _sockets.Base.Input("base", tooltip="From Load Training Base: the SDXL that the encoder belongs to."),
                io.Combo.Input(
                    "encoder_name", options=_host.model_files(ENCODERS), tooltip="In models/lookahead_encoders."
                ),
                io.Combo.Input(
                    "clip_vision_name",
                    options=_host.model_files("clip_vision"),
                    tooltip="The image encoder that it was trained with, ViT-H for the published ones.",
                ),
                io.String.Input(
                    "output_name", default="model_ckpt", tooltip="Name of the new file, without ending. 8 GB or more."
                ),
                _trainer.OVERWRITE,
            ],
            outputs=[
                _sockets.Name.Output(display_name="encoder_name"),
                io.String.Output(display_name="report", tooltip="How the authors' infer.py reads the file."),
            ],
        )

    @classmethod
    def validate_inputs(cls, output_name=None, encoder_name=None, clip_vision_name=None) -> bool | str:
        return first_refusal(
            [
                _trainer.check_output_name(output_name),
                known("encoder", encoder_name, _host.model_files(ENCODERS)),
                known("CLIP-Vision model", clip_vision_name, _host.model_files("clip_vision")),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name=None, clip_vision_name=None, **_others) -> str:
        named = ((ENCODERS, encoder_name), ("clip_vision", clip_vision_name))
        return _host.file_version(*(_host.find_model_file(kind, name) for kind, name in named if name))

    @classmethod
    def execute(cls, base, encoder_name, clip_vision_name, output_name, overwrite=False) -> io.NodeOutput:
        from ..trainers.lookahead.export import ENDING, export

        with _host.memory_given_back(), _host.leave_inference_mode(), _host.short_paths():
            path = _host.save_folder(ENCODERS) / f"{safe_name(output_name)}{ENDING}"
            encoder = _host.model_path(ENCODERS, encoder_name)
            vision = _host.model_path("clip_vision", clip_vision_name)
            written = export(encoder, base, vision, path, overwrite=overwrite)
        report = str(written).replace(str(path), path.name)
        return io.NodeOutput(path.name, report, ui={"text": [report]})
