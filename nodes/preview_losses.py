"""Nodes for what a preview should come closer to: a picture, words or pictures by CLIP, a face."""

from functools import partial
from pathlib import Path

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..models.errors import ConfigError, IncompatibleModelError
from ..models.formats import read_weights
from ..models.lookahead.arcface import ArcFace, build_arcface
from ..models.lookahead.preview_losses import (
    Box,
    cut_out,
    embedding_loss,
    mean_loss,
    picture_loss,
    square_around,
)
from . import _host
from ._choices import known
from ._folders import FACE_NETWORKS
from ._sockets import PreviewLosses
from .clip_embeddings import embed_pictures, image_width, text_target
from .preview_gradient import HostLoss, frozen

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
DISTANCES = ["mean squared", "mean absolute"]


def _weight() -> io.Input:
    return io.Float.Input(
        "weight",
        default=1.0,
        min=0.0,
        max=1000.0,
        step=0.01,
        tooltip="How much this counts beside the other losses of the chain. Alone its value does not matter: the scale "
        "of the guidance sets the strength.",
    )


def _previous() -> io.Input:
    return PreviewLosses.Input(
        "losses", optional=True, tooltip="Further preview losses; pictures are guided by the weighted sum of all."
    )


def _chained(losses: tuple[HostLoss, ...] | None, loss: HostLoss) -> io.NodeOutput:
    return io.NodeOutput((*(losses or ()), loss) if loss.weight else losses or ())


def _pictures(image: Tensor) -> Tensor:
    """Host pictures (batch, height, width, channels) in 0..1 -> (batch, 3, height, width) in -1..1."""
    with torch.inference_mode(False):
        return image[..., :3].clone().movedim(-1, 1).float() * 2 - 1


def _mask(mask: Tensor | None) -> Tensor | None:
    """A host mask -> (height, width); ConfigError for several."""
    if mask is None:
        return None
    if mask.ndim == 3 and len(mask) != 1:
        raise ConfigError(f"one mask is expected, found {len(mask)}; pick one of the batch")
    with torch.inference_mode(False):
        return mask.clone().reshape(mask.shape[-2:])


class PictureLossNode(io.ComfyNode):
    """Colours and layout of a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePreviewLossPicture",
            display_name="Preview Loss (Picture)",
            category="personalize/lookahead",
            description="For Lookahead Preview Guidance: pulls the colours and the layout towards a picture, "
            "everywhere or where a mask is white.",
            inputs=[
                io.Image.Input(
                    "image", tooltip="The picture to come closer to; cropped in the middle to the shape of the result."
                ),
                io.Combo.Input(
                    "distance",
                    options=DISTANCES,
                    default=DISTANCES[0],
                    tooltip="'mean squared' corrects large differences first, such as a wrong background. 'mean "
                    "absolute' treats all alike and keeps edges sharper.",
                ),
                _weight(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the picture counts; cropped like the picture. Not connected: everywhere.",
                ),
                _previous(),
            ],
            outputs=[PreviewLosses.Output(display_name="losses", tooltip="For Lookahead Preview Guidance.")],
        )

    @classmethod
    def validate_inputs(cls, distance=None) -> bool | str:
        return known("distance", distance, DISTANCES)

    @classmethod
    def execute(cls, image, distance, weight, mask=None, losses=None) -> io.NodeOutput:
        if len(image) != 1:
            raise ConfigError(f"one picture is expected, found a batch of {len(image)}; pick one of it")
        return _chained(losses, HostLoss(picture_loss(_pictures(image)[0], distance, _mask(mask)), weight))


class ClipLossNode(io.ComfyNode):
    """What CLIP sees in pictures, or words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePreviewLossCLIP",
            display_name="Preview Loss (CLIP)",
            category="personalize/lookahead",
            description="For Lookahead Preview Guidance: pulls what CLIP sees in the picture towards what it sees in "
            "other pictures, or towards words.",
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder that compares. For words it has to be the one trained together with the "
                    "text encoder: CLIP-ViT-bigG for SDXL, CLIP-ViT-H for SD2.1.",
                ),
                io.String.Input(
                    "text",
                    default="",
                    multiline=True,
                    tooltip="What the picture should show, in words; needs clip. Empty: only the pictures count.",
                ),
                _weight(),
                io.Image.Input(
                    "image", optional=True, tooltip="One or several pictures to come closer to, such as of a subject."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder for the text. Not used without text."),
                _previous(),
            ],
            outputs=[PreviewLosses.Output(display_name="losses", tooltip="For Lookahead Preview Guidance.")],
        )

    @classmethod
    def execute(cls, clip_vision, text, weight, image=None, clip=None, losses=None) -> io.NodeOutput:
        if image is None and not text.strip():
            raise ConfigError("there is nothing to compare with: connect an image, or write a text and connect clip")
        embed = partial(embed_pictures, clip_vision)
        targets = []
        if image is not None:
            comfy.model_management.load_models_gpu([clip_vision.patcher])
            with _host.leave_inference_mode(), torch.no_grad():
                targets.append(torch.cat([embed(one).cpu() for one in _pictures(image).split(1)]))
        if text.strip():
            targets.append(text_target(clip, text))
        if text.strip() and (width := image_width(clip_vision)) != targets[-1].shape[-1]:
            raise IncompatibleModelError(
                f"this CLIP describes words by {targets[-1].shape[-1]} numbers and this CLIP Vision pictures by "
                f"{width}, so they were not trained together; for SDXL load CLIP-ViT-bigG, for SD2.1 CLIP-ViT-H"
            )
        loss = mean_loss([embedding_loss(embed, target) for target in targets])
        return _chained(losses, HostLoss(loss, weight, (clip_vision.patcher,)))


class IdentityLossNode(io.ComfyNode):
    """A person's face."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePreviewLossIdentity",
            display_name="Preview Loss (Identity)",
            category="personalize/lookahead",
            description="For Lookahead Preview Guidance: pulls a face towards a person's, as a face recognition "
            "network sees it (ArcFace, IR-SE50).",
            inputs=[
                io.Combo.Input(
                    "face_network",
                    options=_host.model_files(FACE_NETWORKS),
                    tooltip="The face recognition network model_ir_se50.pth, from the folder models/arcface.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="One or several aligned crops of the person's face: eyes level, face filling the picture.",
                ),
                _weight(),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White where the face will be in the result; the smallest square around it is compared. "
                    "Not connected: the whole picture, for portraits that show little else.",
                ),
                _previous(),
            ],
            outputs=[PreviewLosses.Output(display_name="losses", tooltip="For Lookahead Preview Guidance.")],
        )

    @classmethod
    def validate_inputs(cls, face_network=None) -> bool | str:
        return known("face network", face_network, _host.model_files(FACE_NETWORKS))

    @classmethod
    def fingerprint_inputs(cls, face_network, **_others) -> str:
        return _host.model_version(FACE_NETWORKS, face_network)

    @classmethod
    def execute(cls, face_network, image, weight, mask=None, losses=None) -> io.NodeOutput:
        box = WHOLE if mask is None else square_around(_mask(mask))
        path = _host.model_path(FACE_NETWORKS, face_network)
        with _host.leave_inference_mode(), torch.no_grad():
            patcher = frozen(load_face_network(path))
            comfy.model_management.load_models_gpu([patcher])
            embed = partial(embed_faces, patcher)
            targets = torch.cat([embed(one, WHOLE).cpu() for one in _pictures(image).split(1)])
        return _chained(losses, HostLoss(embedding_loss(partial(embed, box=box), targets), weight, (patcher,)))


def load_face_network(path: Path) -> ArcFace:
    """ArcFace from a file in the layout of model_ir_se50.pth; FormatError for anything else."""
    return build_arcface(read_weights(path)[0], path.name)


def embed_faces(patcher, pictures: Tensor, box: Box) -> Tensor:
    """Unit vectors (batch, dim) of the faces in a box of pictures (batch, 3, height, width), differentiable."""
    faces = cut_out(pictures, box, patcher.model.size)
    return patcher.model(faces.to(patcher.load_device)).to(pictures.device)
