"""Nodes that load what was trained: a LoRA with its learned tokens, or the tokens alone."""

from collections.abc import Mapping
from pathlib import Path

from comfy_api.latest import io

from ..models.formats import read_header, read_weights
from ..models.learned_embeddings import (
    BUNDLE,
    files_of_tokens,
    parse_triggers,
    read_learned_embeddings,
    tokens_of_lora,
)
from . import _host
from ._choices import known
from .learned_tokens import teach, tokens_output
from .lora_layers import match_lora
from .switchable_lora import SwitchableLora, attach, require_unet


def _token_files(path: Path, metadata: Mapping[str, str]) -> list[Path]:
    """Files with the tokens that belong to a LoRA but are not part of it."""
    return files_of_tokens(path, metadata, lambda name: _host.find_model_file("embeddings", name))


class LoadDCOLoRA(io.ComfyNode):
    """Put a switchable LoRA on a model and its learned tokens on a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadDCOLoRA",
            display_name="Load DCO LoRA",
            category="personalize/dco",
            description="Loads a LoRA that Reward Guider can switch on and off for each prompt, together with its "
            "learned tokens. Works with any LoRA for this model. With an ordinary KSampler it acts like Load LoRA. "
            "Chain two of these nodes for a subject and a style.",
            inputs=[
                io.Model.Input("model", tooltip="The model to personalize: SD1.5, SD2.1 or SDXL."),
                io.Combo.Input(
                    "lora_name",
                    options=_host.model_files("loras"),
                    tooltip="The LoRA file. The DCO authors' pytorch_lora_weights.safetensors, kept in a folder of "
                    "its own inside the loras folder, also brings the learned_embeds.safetensors beside it.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the picture model. 1 is as trained, 0 is off.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA changes the text encoders, if it was trained on them. Encode the "
                    "base and negative prompts with the CLIP from before this node to keep them unchanged.",
                ),
                io.String.Input(
                    "tokens",
                    default="",
                    tooltip="Usually empty: the file names its tokens. For a file that does not, write them here in "
                    "the order of training, separated by commas, such as <dog>, <hat>. Also renames tokens.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders. Without it no learned token is loaded and the text stays unchanged.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                tokens_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None) -> bool | str:
        return known("LoRA", lora_name, _host.model_files("loras"))

    @classmethod
    def fingerprint_inputs(cls, lora_name, **_others) -> str:
        path = _host.find_model_file("loras", lora_name) if lora_name else None
        if path is None:
            return ""
        metadata = read_header(path).metadata if path.suffix == ".safetensors" else {}
        return _host.file_version(path, *_token_files(path, metadata))

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, tokens="", clip=None) -> io.NodeOutput:
        require_unet(model)
        path = _host.model_path("loras", lora_name)
        tensors, metadata = read_weights(path)
        triggers, files = parse_triggers(tokens), _token_files(path, metadata)
        bundled = any(key.startswith(BUNDLE) for key in tensors)
        # Without a CLIP nothing can be taught, and so nothing is missed.
        wanted = clip is not None or triggers or bundled or files
        embeddings = tokens_of_lora(path, tensors, metadata, () if bundled else files, triggers) if wanted else []
        matched = match_lora(path.name, tensors, metadata, model, clip)
        if clip is not None and embeddings:
            clip = teach(clip, embeddings, path.name)
        if matched.text and strength_clip:
            clip = clip.clone()
            clip.add_patches(matched.text, strength_clip)
        model = attach(model, SwitchableLora(path.name, matched.unet, strength_model))
        return io.NodeOutput(model, clip, ", ".join(embedding.trigger for embedding in embeddings))


class LoadLearnedTokens(io.ComfyNode):
    """Put learned tokens on a CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadLearnedTokens",
            display_name="Load Learned Tokens",
            category="personalize/tokens",
            description="Teaches a CLIP words that were learned from pictures, for use in the ordinary CLIP Text "
            "Encode: ours, textual inversions of A1111 and diffusers, and tokens bundled in LoRA files.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders that the token was trained on."),
                io.Combo.Input(
                    "embedding_name",
                    options=_host.model_files("embeddings"),
                    tooltip="The file with the learned token, from the embeddings folder.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="The word to write in prompts, such as <dog>. Empty: as the file says, or the file's name "
                    "in angle brackets. Several tokens: separate their names by commas.",
                ),
            ],
            outputs=[
                io.Clip.Output(display_name="clip"),
                tokens_output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, embedding_name=None) -> bool | str:
        return known("embedding", embedding_name, _host.model_files("embeddings"))

    @classmethod
    def fingerprint_inputs(cls, embedding_name, **_others) -> str:
        return _host.model_version("embeddings", embedding_name)

    @classmethod
    def execute(cls, clip, embedding_name, trigger="") -> io.NodeOutput:
        path = _host.model_path("embeddings", embedding_name)
        embeddings = read_learned_embeddings(path, parse_triggers(trigger))
        taught = teach(clip, embeddings, path.name)
        return io.NodeOutput(taught, ", ".join(embedding.trigger for embedding in embeddings))
