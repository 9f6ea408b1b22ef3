"""Nodes that make an identity from pictures of a face, and keep it."""

from pathlib import Path
from typing import get_args

import folder_paths
from comfy_api.latest import io

from ..models.formats import safe_name
from ..models.lookahead.encoder import read_encoder
from ..models.lookahead.identity import Pictures, read_identity, write_identity
from . import _host, _sockets, _trainer
from ._choices import known
from ._folders import ENCODERS, IDENTITIES
from .identity_encoding import identity_of

IP_ADAPTERS = "ipadapter"
"""Kind of folder that the IP-Adapter extensions register."""


class LoadLookaheadEncoder(io.ComfyNode):
    """A face encoder from its file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadLookaheadEncoder",
            display_name="Load Lookahead Encoder",
            category="personalize/lookahead",
            description="Loads a face encoder: ours, the LCM-Lookahead authors' model_ckpt.pt, or an "
            "ip-adapter-plus(-face) file for SDXL, which brings the likeness of its tokens but has not learned to "
            "share attention.",
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=_encoders(),
                    tooltip="The file, in models/lookahead_encoders, or in models/ipadapter where another extension "
                    "uses that folder.",
                ),
            ],
            outputs=[_sockets.Encoder.Output(display_name="encoder")],
        )

    @classmethod
    def validate_inputs(cls, encoder_name=None) -> bool | str:
        return known("encoder", encoder_name, _encoders())

    @classmethod
    def fingerprint_inputs(cls, encoder_name=None) -> str:
        return _host.file_version(_find_encoder(encoder_name) if encoder_name else None)

    @classmethod
    def execute(cls, encoder_name) -> io.NodeOutput:
        with _host.memory_given_back(), _host.short_paths():
            path = _find_encoder(encoder_name) or _host.model_path(ENCODERS, encoder_name)
            return io.NodeOutput(read_encoder(path))


class EncodeIdentity(io.ComfyNode):
    """Tokens and reference latents of one or more people."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeEncodeIdentity",
            display_name="Encode Identity",
            category="personalize/lookahead",
            description="Makes an identity from pictures of a face, for Lookahead Guider and KSampler (Lookahead). "
            "Takes a second and can be saved.",
            inputs=[
                _sockets.Encoder.Input("encoder", tooltip="From Load Lookahead Encoder."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="From Load CLIP Vision. The published encoders need ViT-H/14."
                ),
                io.Image.Input(
                    "image",
                    tooltip="Pictures of the face, which should fill a good part of them. Only the middle square is "
                    "seen by CLIP-Vision.",
                ),
                io.Combo.Input(
                    "pictures",
                    options=list(get_args(Pictures)),
                    default=get_args(Pictures)[0],
                    tooltip="What a batch of pictures shows: one person, whose tokens are averaged or strung together "
                    "(concat), or one person each, where picture 1 goes with the first picture of the latent batch, "
                    "and so on.",
                ),
                io.Int.Input(
                    "reference_size",
                    default=1024,
                    min=64,
                    max=4096,
                    step=64,
                    tooltip="Side of the square that has as many pixels as the reference picture gets; it keeps its "
                    "proportions. Take about the size of what you generate.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="The SDXL checkpoint's VAE. Without it, only the adapter can be used: attention sharing "
                    "needs the picture itself.",
                ),
            ],
            outputs=[_sockets.Identity.Output(display_name="identity")],
        )

    @classmethod
    def validate_inputs(cls, pictures=None) -> bool | str:
        return known("way to join pictures", pictures, get_args(Pictures))

    @classmethod
    def execute(cls, encoder, clip_vision, image, pictures, reference_size, vae=None) -> io.NodeOutput:
        return io.NodeOutput(identity_of(encoder, clip_vision, image, pictures, reference_size, vae))


class SaveIdentity(io.ComfyNode):
    """A file with an identity."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSaveIdentity",
            display_name="Save Identity",
            category="personalize/lookahead",
            description="Saves an identity, half a megabyte, so that the person can be drawn again without pictures, "
            "CLIP-Vision and VAE.",
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                _sockets.Identity.Input("identity", tooltip="From Encode Identity."),
                io.String.Input(
                    "output_name",
                    default="my_face",
                    tooltip="Name of the file, without ending. Saved in models/identities; press R to see it in lists.",
                ),
                _trainer.OVERWRITE,
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="identity_name", tooltip="Name of the file; connect it to Load Identity."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, output_name=None) -> bool | str:
        return _trainer.check_output_name(output_name)

    @classmethod
    def execute(cls, identity, output_name, overwrite=False) -> io.NodeOutput:
        path = _host.save_folder(IDENTITIES) / f"{safe_name(output_name)}.safetensors"
        with _host.short_paths():
            written = write_identity(path, identity, _trainer.origin_metadata(cls.hidden), overwrite=overwrite)
        return io.NodeOutput(written.name, ui={"text": [f"saved {written.name}"]})


class LoadIdentity(io.ComfyNode):
    """An identity from its file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadIdentity",
            display_name="Load Identity",
            category="personalize/lookahead",
            description="Loads an identity that Save Identity kept. It goes with the encoder that made it, and no "
            "other.",
            inputs=[
                io.Combo.Input(
                    "identity_name",
                    options=_host.model_files(IDENTITIES),
                    tooltip="The file, in models/identities.",
                ),
            ],
            outputs=[_sockets.Identity.Output(display_name="identity")],
        )

    @classmethod
    def validate_inputs(cls, identity_name=None) -> bool | str:
        return known("identity", identity_name, _host.model_files(IDENTITIES))

    @classmethod
    def fingerprint_inputs(cls, identity_name=None) -> str:
        return _host.model_version(IDENTITIES, identity_name)

    @classmethod
    def execute(cls, identity_name) -> io.NodeOutput:
        with _host.short_paths():
            return io.NodeOutput(read_identity(_host.model_path(IDENTITIES, identity_name)))


def _encoders() -> list[str]:
    """Files that may hold an encoder; a name that both folders have is listed once and means the first one's."""
    kinds = [kind for kind in (ENCODERS, IP_ADAPTERS) if kind in folder_paths.folder_names_and_paths]
    return list(dict.fromkeys(name for kind in kinds for name in _host.model_files(kind)))


def _find_encoder(name: str) -> Path | None:
    return _host.find_model_file(ENCODERS, name) or _host.find_model_file(IP_ADAPTERS, name)
