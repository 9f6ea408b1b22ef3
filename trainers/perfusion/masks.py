"""Soft masks of the subject by CLIPSeg (arXiv 2112.10003), averaged over prompts as the authors do."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ...models.errors import ConfigError, IncompatibleModelError
from ..network_folders import IMAGENET_COLOURS, Preprocessing, load_network, read_preprocessing, require_network
from ..tokenizer import load_tokenizer
from .prompts import read_templates

_SIDE = 352
"""Of the squares that CLIPSeg was trained on, in pixels, where no preprocessor_config.json says it."""


@dataclass(frozen=True, eq=False)
class Segmenter:
    """CLIPSeg, which finds in a picture what words name."""

    name: str
    network: nn.Module
    preprocessing: Preprocessing
    tokenizer: Path | None
    """Folder of the tokenizer; None stands for the one that load_tokenizer builds."""

    @torch.no_grad()
    def masks(self, pictures: Iterable[Image.Image], prompts: Sequence[str]) -> Iterator[Tensor]:
        """Yield of each picture where the prompts' subject is, (height, width) in 0..1, float32 on the CPU.

        The mean over the prompts of the network's probabilities, as the authors make their masks
        (data/soft_segment.py); enlarged from the network's square to the picture.

        Args:
            pictures: mode RGB, of any sizes.

        Raises:
            IncompatibleModelError: the network answers with values that are no numbers.
        """
        words = self._words(prompts)
        for picture in pictures:
            pixels = self.preprocessing(picture)[None].to(words).expand(len(words), -1, -1, -1)
            logits = self.network(pixel_values=pixels, conditional_embeddings=words).logits
            likely = logits.float().sigmoid().reshape(len(words), 1, *logits.shape[-2:]).mean(dim=0, keepdim=True)
            if not likely.isfinite().all():
                raise IncompatibleModelError(
                    f"{self.name}: the network answers with values that are no numbers; its files are damaged, "
                    "download them again"
                )
            size = (picture.height, picture.width)
            yield F.interpolate(likely, size, mode="bilinear", align_corners=False)[0, 0].cpu()

    def _words(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of prompts in the space that they share with pictures, (prompts, dim)."""
        longest, tokenizer = self.network.config.text_config.max_position_embeddings, load_tokenizer(self.tokenizer)
        rows = []
        for prompt in prompts:
            ids = tokenizer(prompt, truncation=True, max_length=longest, return_tensors="pt").input_ids
            rows.append(self.network.get_conditional_embeddings(1, ids.to(self.network.device)))
        return torch.cat(rows)


def subject_prompts(subject: str, templates: str = "") -> list[str]:
    """One prompt for each template, the authors' for ''; ConfigError without a subject or for a bad template."""
    if not subject.strip():
        raise ConfigError("there is no subject to look for; name it in a word or two, such as teddy")
    return [template.replace("{}", subject.strip()) for template in read_templates(templates)]


def load_segmenter(folder: Path, tokenizer: Path | None = None) -> Segmenter:
    """CLIPSeg from a folder, in float32 on the CPU.

    Args:
        folder: holds config.json and the weights, as saved by transformers.
        tokenizer: a folder with CLIP's tokenizer, for when ``folder`` holds none.

    Raises:
        FormatError: the folder holds no complete CLIPSeg.
    """
    require_network(folder, "clipseg", "CLIPSeg, such as CIDAS/clipseg-rd64-refined")
    from transformers import CLIPSegForImageSegmentation

    network = load_network(CLIPSegForImageSegmentation, folder)
    seen = read_preprocessing(folder, _SIDE, IMAGENET_COLOURS)
    own = any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json"))
    # All of the picture, whatever its shape: a mask of its middle would be none of the rest.
    whole = replace(seen, resize=seen.crop, resample=Image.Resampling.BILINEAR)
    return Segmenter(folder.name, network, whole, folder if own else tokenizer)
