"""Custom Diffusion in the host: weights of cross-attention replaced by patches, on a clone."""

import comfy.lora
from comfy_api.latest import io

from ..models.custom_diffusion import CustomDiffusion, read_custom_diffusion
from ..models.errors import IncompatibleModelError
from . import _host
from ._choices import known
from ._folders import CUSTOM_DIFFUSIONS
from .learned_tokens import teach, tokens_output
from .switchable_lora import require_unet
from .unet_names import host_names


def patched(model, changed: CustomDiffusion, strength: float, name: str):
    """A clone whose weights go from the model's own, at strength 0, to the trained ones, at 1.

    Raises:
        IncompatibleModelError: the UNet lacks a layer, or has it in another size.
    """
    names = host_names(model)
    own = {key.removeprefix("diffusion_model."): value for key, value in model.model_state_dict().items()}

    def place(parameter: str, shape: tuple[int, ...]) -> str:
        module, kind = parameter.rsplit(".", 1)
        found = f"{names.get(module)}.{kind}"
        if found not in own or tuple(own[found].shape) != shape:
            raise IncompatibleModelError(
                f"{name}: {parameter} of size {shape} does not fit this model; load the checkpoint family that it was "
                "trained on"
            )
        return f"diffusion_model.{found}"

    whole = {place(key, tuple(weight.shape)): ("diff", (weight,)) for key, weight in changed.weights.items()}
    factors, targets = {}, {}
    for key, change in changed.changes.items():
        targets[key] = place(key, (change.up.shape[0], change.down.shape[1]))
        factors |= {f"{key}.lora_up.weight": change.up * change.scale, f"{key}.lora_down.weight": change.down}
    clone = model.clone()
    clone.add_patches(whole, strength, 1.0 - strength)
    clone.add_patches(comfy.lora.load_lora(factors, targets, log_missing=False), strength)
    return clone


class LoadCustomDiffusion(io.ComfyNode):
    """Put a Custom Diffusion on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadCustomDiffusion",
            display_name="Load Custom Diffusion",
            category="personalize/tokens",
            description="Replaces keys and values of a model's cross-attention by trained ones, and teaches the CLIP "
            "the words trained with them. Reads the authors' delta.bin as well, compressed or not.",
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint that it was trained on."),
                io.Combo.Input(
                    "custom_name",
                    options=_host.model_files(CUSTOM_DIFFUSIONS),
                    tooltip="The trained file, from the folder models/custom_diffusion.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="0 keeps the model's own keys and values, 1 takes the trained ones; between lies between.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders. Without it no word is loaded.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                tokens_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, custom_name=None) -> bool | str:
        return known("Custom Diffusion file", custom_name, _host.model_files(CUSTOM_DIFFUSIONS))

    @classmethod
    def fingerprint_inputs(cls, custom_name=None, **_others) -> str:
        return _host.model_version(CUSTOM_DIFFUSIONS, custom_name)

    @classmethod
    def execute(cls, model, custom_name, strength, clip=None) -> io.NodeOutput:
        require_unet(model)
        path = _host.model_path(CUSTOM_DIFFUSIONS, custom_name)
        changed = read_custom_diffusion(path)
        model = patched(model, changed, strength, path.name)
        if clip is not None and changed.tokens:
            clip = teach(clip, changed.tokens, path.name)
        return io.NodeOutput(model, clip, ", ".join(token.trigger for token in changed.tokens))
