"""Networks that judge pictures: CLIP, and DINO's kind."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .network_folders import (
    CLIP_COLOURS,
    IMAGENET_COLOURS,
    Preprocessing,
    load_network,
    read_preprocessing,
    require_network,
)
from .tokenizer import load_tokenizer


@dataclass(frozen=True, eq=False)
class ClipJudge:
    """CLIP, for pictures and words."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    tokenizer: Path | None
    """Folder of the tokenizer, which is opened for texts alone; None stands for the one that load_tokenizer builds."""

    @torch.no_grad()
    def embed_images(self, images: Iterable[Image.Image]) -> Tensor:
        """(images, dim), float32 on the CPU; it asks for one after the other, and keeps none."""
        pixels = torch.stack([self.preprocessing(image) for image in images]).to(self.network.device)
        hidden = self.network.vision_model(pixel_values=pixels).pooler_output
        return self.network.visual_projection(hidden).float().cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(texts, dim), float32 on the CPU; of a text, CLIP reads its first 75 tokens. Errors as load_tokenizer."""
        tokenizer = load_tokenizer(self.tokenizer)
        longest = self.network.config.text_config.max_position_embeddings
        rows = []
        for text in texts:
            ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt").input_ids
            hidden = self.network.text_model(input_ids=ids.to(self.network.device)).pooler_output
            rows.append(self.network.text_projection(hidden).float().cpu())
        return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class DinoJudge:
    """A vision transformer without words."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """The class token of the last layer, (images, dim), float32 on the CPU."""
        pixels = torch.stack([self.preprocessing(image) for image in images]).to(self.network.device)
        return self.network(pixel_values=pixels).last_hidden_state[:, 0].float().cpu()


def load_clip_judge(folder: Path, tokenizer: Path | None = None) -> ClipJudge:
    """CLIP from a folder, in float32 on the CPU.

    Args:
        folder: holds config.json and the weights, as saved by transformers.
        tokenizer: a folder with CLIP's tokenizer, for when ``folder`` holds none.

    Raises:
        FormatError: the folder holds no complete CLIP.
    """
    require_network(folder, "clip", "CLIP with image and text encoder, such as openai/clip-vit-large-patch14")
    from transformers import CLIPModel

    network = load_network(CLIPModel, folder)
    preprocessing = read_preprocessing(folder, network.config.vision_config.image_size, CLIP_COLOURS)
    own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    return ClipJudge(folder.name, network, preprocessing, folder if own else tokenizer)


def load_dino_judge(folder: Path) -> DinoJudge:
    """DINO, DINOv2 or DINOv3 from a folder, in float32 on the CPU; FormatError as for load_clip_judge."""
    require_network(folder, "dino", "DINO or DINOv2, such as facebook/dino-vits16 or facebook/dinov2-base")
    from transformers import AutoModel

    network = load_network(AutoModel, folder)
    return DinoJudge(folder.name, network, read_preprocessing(folder, network.config.image_size, IMAGENET_COLOURS))
