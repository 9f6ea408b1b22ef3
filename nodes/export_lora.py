"""The same LoRA in the layout that another program expects."""

import json
from pathlib import Path

from comfy_api.latest import io

from ..models.errors import IncompatibleModelError
from ..models.families import FAMILIES
from ..models.formats import read_weights, safe_name, stored_layers_per_block, write_safetensors
from ..models.lora import diffusers_tensors, kohya_tensors, parse_lora
from . import _host, _sockets, _trainer
from ._choices import first_refusal, known

LAYOUTS = ["kohya (ComfyUI, A1111, Forge)", "diffusers"]


class ExportLoRA(io.ComfyNode):
    """Write a LoRA in kohya's or diffusers' layout."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeExportLoRA",
            display_name="Export LoRA (kohya / diffusers)",
            category="personalize/tools",
            description="Copies a LoRA into the layout of another program, under a new name in the loras folder. "
            "Also reads the files of the DCO authors and of other trainers.",
            is_output_node=True,
            inputs=[
                io.Combo.Input("lora_name", options=_host.model_files("loras"), tooltip="The LoRA to convert."),
                io.Combo.Input("layout", options=LAYOUTS, default=LAYOUTS[0], tooltip="Who is going to read it."),
                io.Combo.Input(
                    "family",
                    options=["auto", *FAMILIES],
                    default="auto",
                    tooltip="Base model family; auto reads it from the file. kohya's layout names layers differently "
                    "for SDXL.",
                ),
                io.String.Input("output_name", default="exported", tooltip="Name of the new file, without ending."),
                _trainer.OVERWRITE,
            ],
            outputs=[_sockets.Name.Output(display_name="lora_name")],
        )

    @classmethod
    def validate_inputs(cls, output_name=None, lora_name=None, layout=None, family=None) -> bool | str:
        return first_refusal(
            [
                _trainer.check_output_name(output_name),
                known("LoRA", lora_name, _host.model_files("loras")),
                known("layout", layout, LAYOUTS),
                known("family", family, ["auto", *FAMILIES]),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_others) -> str:
        return _host.model_version("loras", lora_name)

    @classmethod
    def execute(cls, lora_name, layout, family, output_name, overwrite=False) -> io.NodeOutput:
        with _host.short_paths():
            written = cls._export(lora_name, layout, family, output_name, overwrite)
        return io.NodeOutput(written.name, ui={"text": [f"saved {written.name}"]})

    @classmethod
    def _export(cls, lora_name, layout, family, output_name, overwrite) -> Path:
        path = _host.model_path("loras", lora_name)
        tensors, metadata = read_weights(path)
        layers = stored_layers_per_block(metadata)
        deltas = parse_lora(tensors, path.name, layers_per_block=layers)
        if family == "auto":
            family = metadata.get("personalize.family") or _family_of(deltas, path.name)
        bundled = {key: value for key, value in tensors.items() if key.startswith("bundle_emb.")}
        if layout == LAYOUTS[0]:
            converted = kohya_tensors(deltas, family, layers_per_block=layers) | bundled
        else:
            # diffusers refuses files with keys that are not of a LoRA; the tokens have a file of their own.
            converted = diffusers_tensors(deltas)
        folder = _host.save_folder("loras")
        metadata = metadata | {"personalize.exported_from": json.dumps(path.name)}
        return write_safetensors(
            folder / f"{safe_name(output_name)}.safetensors", converted, metadata, overwrite=overwrite
        )


def _family_of(deltas, name: str) -> str:
    """The family whose cross-attention has the width that the LoRA reads."""
    widths = {"768": "sd15", "1024": "sd21", "2048": "sdxl"}
    for key, delta in deltas.items():
        if key.endswith("attn2.to_k") and (found := widths.get(str(delta.down.shape[1]))):
            return found
    raise IncompatibleModelError(
        f"{name}: its base model could not be told from its layers; choose the family yourself instead of auto"
    )
