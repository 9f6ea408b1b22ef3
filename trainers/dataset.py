"""The training dataset: pictures with captions, base captions, masks and class pictures, checked when it is made."""

import hashlib
import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..models.errors import ConfigError, DatasetError
from ..models.tokens import LearnedToken, check_distinct
from . import layouts
from .captions import clean, derive_base, refuse_tokens, spread, tokens_in
from .pictures import Crop, Cut, OpenPicture, Picture, same_shape


@dataclass(frozen=True)
class Example:
    """One picture and what is said about it."""

    picture: Picture
    caption: str
    """What the trained model reads; carries the learned tokens."""
    base_caption: str
    """The same in ordinary words, for the frozen base model."""
    mask: Picture | None = None
    """White where the picture counts; without it the picture's own transparency is used, if it has any."""
    identity: str | None = None
    """Label shared by pictures of one person."""

    def open(self) -> OpenPicture:
        """Decode the picture with its mask, to take several cuts from it."""
        opened = self.picture.open()
        return opened if self.mask is None else replace(opened, mask=self.mask.open_mask())

    def load(
        self,
        size: int | tuple[int, int],
        *,
        crop: Crop = "center",
        flip: bool = False,
        generator: torch.Generator | None = None,
    ) -> Cut:
        """Decode and cut once; see ``OpenPicture.cut``."""
        return self.open().cut(size, crop=crop, flip=flip, generator=generator)


@dataclass(frozen=True)
class Dataset:
    """Pictures to learn from and, for prior preservation, pictures of the class to keep.

    Raises DatasetError when it is made with contradictions: no picture, a caption without any of the
    learned tokens, a token that no caption uses, a base or class caption that carries a token, a mask
    shaped unlike its picture. ConfigError when a token is given twice.
    """

    examples: tuple[Example, ...]
    class_examples: tuple[Example, ...] = ()
    tokens: tuple[LearnedToken, ...] = ()
    """Learned tokens in the captions; without any, a style or subject is trained on ordinary words."""

    def __post_init__(self) -> None:
        if not self.examples:
            raise DatasetError("the dataset has no pictures; add at least one")
        check_distinct(self.tokens)
        triggers = [token.trigger for token in self.tokens]
        used: set[int] = set()
        for example in self.examples:
            found = tokens_in(example.caption, triggers)
            if triggers and not found:
                raise DatasetError(
                    f"{example.picture.name}: caption {example.caption!r} contains none of the learned tokens; "
                    f"write {' or '.join(triggers)} where the subject is named"
                )
            used |= found
            refuse_tokens("base caption", example.picture.name, example.base_caption, triggers)
            _check_mask(example)
        if unused := [trigger for index, trigger in enumerate(triggers) if index not in used]:
            raise DatasetError(f"token {unused[0]} is in no caption and would learn nothing; use it or leave it out")
        for example in self.class_examples:
            refuse_tokens("class caption", example.picture.name, example.caption, triggers)
            _check_mask(example)

    @classmethod
    def build(
        cls,
        pictures: Sequence[Picture],
        captions: str | Sequence[str],
        *,
        base_captions: str | Sequence[str | None] | None = None,
        masks: Sequence[Picture | None] | None = None,
        identities: Sequence[str | None] | None = None,
        tokens: Sequence[LearnedToken] = (),
    ) -> Self:
        """Bring pictures and texts together; one caption or base caption alone serves every picture.

        A base caption that is missing (None) is the caption with each token replaced by its initializer.

        Raises:
            DatasetError: numbers do not match, a caption is empty, or a base caption is missing for a
                token without initializer; and what the class itself refuses.
        """
        count = len(pictures)
        if not count:
            raise DatasetError("the dataset has no pictures; add at least one")
        captions = spread(captions, count, "caption")
        bases = spread(base_captions, count, "base caption")
        labels = spread(identities, count, "identity label", one_for_all=False)
        mask_list = spread(masks, count, "mask", one_for_all=False)
        check_distinct(tokens)
        examples = []
        for picture, caption, base, mask, label in zip(pictures, captions, bases, mask_list, labels):
            caption = clean(caption)
            if not caption:
                raise DatasetError(f"{picture.name}: the caption is empty; describe the picture in a few words")
            base = clean(base) or derive_base(caption, tokens, picture.name)
            examples.append(Example(picture, caption, base, mask, label))
        return cls(tuple(examples), tokens=tuple(tokens))

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        tokens: Sequence[LearnedToken] | None = None,
        captions: str | Sequence[str] | None = None,
        base_captions: str | Sequence[str | None] | None = None,
        masks: str | Path | None = None,
        section: str | None = None,
        class_folder: str | Path | None = None,
        class_captions: str | Sequence[str] | None = None,
        class_count: int | None = None,
        within: Path | None = None,
    ) -> Self:
        """Read every picture of one folder, not its sub-folders, in natural order (2.jpg before 10.jpg).

        Captions come from ``captions``; else from ``config.json``, if the folder has one in the DCO
        authors' layout (then it also says which pictures, base captions and tokens; see ``from_json``);
        else from text files: ``dog.txt`` beside ``dog.jpg``, with the optional ``dog.base.txt`` for the
        base caption. Masks are ``mask/dog.png``, any format, white on the subject; pictures without one
        count as a whole.

        Args:
            tokens: learned tokens; None takes those of ``config.json``, or none.
            masks: folder of masks when it is not ``mask/``.
            section: which part of ``config.json`` to use.
            class_folder, class_captions, class_count: see ``with_class_folder``.
            within: folder that no path in ``config.json`` may lead out of.
        """
        folder = layouts.folder(path)
        config = folder / layouts.CONFIG_NAME
        if captions is None and (section is not None or layouts.has_sections(config)):
            dataset = cls.from_json(
                config, section, tokens=tokens, base_captions=base_captions, masks=masks, within=within
            )
        else:
            files = layouts.picture_files(folder)
            if captions is None:
                captions = layouts.sidecar_captions(files)
            if base_captions is None:
                base_captions = layouts.sidecar_base_captions(files)
            dataset = cls.build(
                [Picture.from_file(file) for file in files],
                captions,
                base_captions=base_captions,
                masks=_mask_pictures(layouts.mask_files(files, folder, masks)),
                tokens=tokens or (),
            )
        if class_folder is not None:
            dataset = dataset.with_class_folder(class_folder, class_captions, count=class_count)
        return dataset

    @classmethod
    def from_json(
        cls,
        path: str | Path,
        name: str | None = None,
        *,
        tokens: Sequence[LearnedToken] | None = None,
        base_captions: str | Sequence[str | None] | None = None,
        masks: str | Path | None = None,
        within: Path | None = None,
    ) -> Self:
        """Read a JSON file in the layout of kyungmnlee/dco: sections with images, prompts and, optionally,
        base_prompts, inserting_tokens, initializer_tokens, masks, class_images_dir, class_prompts.

        Without ``name`` the only section is taken, or the only one that has base_prompts or
        inserting_tokens. A file without sections, with ``images`` at the top, works too. Paths are
        relative to the JSON file's folder; when nothing lies there, the file's bare name beside the
        JSON is tried, so that the authors' repository-relative paths work wherever the folder is put.

        Args:
            tokens, base_captions: replace what the file says.
            masks: folder of masks, when the file lists none; default ``mask/`` beside the JSON.
            within: folder that no path in the file may lead out of.
        """
        entry = layouts.read_json(path, name, within=within)
        if tokens is None:
            tokens = tuple(LearnedToken(trigger, initializer) for trigger, initializer in entry.tokens)
        mask_paths = entry.masks
        if mask_paths is None:
            mask_paths = layouts.mask_files(entry.images, Path(path).parent, masks)
        dataset = cls.build(
            [Picture.from_file(file) for file in entry.images],
            entry.prompts,
            base_captions=entry.base_prompts if base_captions is None else base_captions,
            masks=_mask_pictures(mask_paths),
            tokens=tokens,
        )
        if entry.class_folder is not None:
            dataset = dataset.with_class_folder(entry.class_folder, entry.class_prompts)
        return dataset

    @classmethod
    def from_tensors(
        cls,
        images: Tensor | Sequence[Tensor],
        captions: str | Sequence[str],
        *,
        base_captions: str | Sequence[str | None] | None = None,
        masks: Tensor | Sequence[Tensor | None] | None = None,
        identities: Sequence[str | None] | None = None,
        tokens: Sequence[LearnedToken] = (),
        class_images: Tensor | Sequence[Tensor] | None = None,
        class_captions: str | Sequence[str] | None = None,
    ) -> Self:
        """Take pictures from memory, as the host's IMAGE and MASK carry them.

        Args:
            images: (batch, height, width, channels) or a list of (height, width, channels), in 0..1;
                a fourth channel is transparency.
            masks: (batch, height, width) or a list of (height, width) or None, in 0..1, 1 on the subject.
            class_images, class_captions: pictures of the class to keep, and one caption or one each.
        """
        dataset = cls.build(
            [Picture.from_tensor(image, f"image {index}") for index, image in enumerate(images, start=1)],
            captions,
            base_captions=base_captions,
            masks=None if masks is None else _mask_tensors(masks),
            identities=identities,
            tokens=tokens,
        )
        if class_images is None:
            return dataset
        if class_captions is None:
            raise DatasetError("the class images have no caption; give one, such as 'a photo of a dog'")
        pictures = [Picture.from_tensor(image, f"class image {index}") for index, image in enumerate(class_images, 1)]
        return dataset.with_class_pictures(pictures, class_captions)

    def with_class_folder(
        self, path: str | Path, captions: str | Sequence[str] | None = None, *, count: int | None = None
    ) -> Self:
        """A copy with a folder of class pictures, captioned by ``captions`` or by text files beside them.

        ``count`` keeps the first so many in natural order.
        """
        files = layouts.picture_files(layouts.folder(path))
        if count is not None:
            if len(files) < count:
                raise DatasetError(
                    f"{path}: found {len(files)} class pictures, expected {count}; add more or ask for fewer"
                )
            files = files[:count]
        if captions is None:
            captions = layouts.sidecar_captions(files)
        return self.with_class_pictures([Picture.from_file(file) for file in files], captions)

    def with_class_pictures(self, pictures: Sequence[Picture], captions: str | Sequence[str]) -> Self:
        """A copy whose class examples are these pictures; one caption alone serves all of them."""
        return replace(self, class_examples=Dataset.build(pictures, captions).examples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over all that training reads: pictures, texts, masks, identities and tokens, not file names."""
        content: dict[str, Any] = {
            "examples": [_content(example) for example in self.examples],
            "class_examples": [_content(example) for example in self.class_examples],
            "tokens": [[token.trigger, token.initializer, token.rows] for token in self.tokens],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def preview(self, max_side: int = 256) -> Tensor:
        """Thumbnails of the examples, letterboxed on black: (examples, max_side, max_side, 3) in 0..1."""
        thumbnails = []
        for example in self.examples:
            picture = example.picture.open().rgb
            scale = max_side / max(picture.size)
            width, height = (max(1, round(length * scale)) for length in picture.size)
            canvas = Image.new("RGB", (max_side, max_side))
            small = picture.resize((width, height), Image.Resampling.BILINEAR)
            canvas.paste(small, ((max_side - width) // 2, (max_side - height) // 2))
            thumbnails.append(torch.from_numpy(np.array(canvas, dtype=np.float32) / 255))
        return torch.stack(thumbnails)


def check_tokens_are_new(tokens: Sequence[LearnedToken], vocabulary: Container[str]) -> None:
    """Raise ConfigError when a trigger is already a word of the tokenizer, which training must not redefine.

    Args:
        vocabulary: the tokenizer's entries; CLIP marks the end of a word with ``</w>``.
    """
    for token in tokens:
        word = token.trigger.lower()
        if token.trigger in vocabulary or word in vocabulary or f"{word}</w>" in vocabulary:
            raise ConfigError(f"token {token.trigger} is already in the tokenizer's vocabulary; choose another name")


def _check_mask(example: Example) -> None:
    mask, picture = example.mask, example.picture
    if mask is not None and not same_shape(mask.size, picture.size):
        raise DatasetError(
            f"{mask.name}: the mask is {mask.size[1]} x {mask.size[0]} pixels, its picture {picture.name} is "
            f"{picture.size[1]} x {picture.size[0]}; make the mask from the same picture"
        )


def _content(example: Example) -> list[str | None]:
    mask = None if example.mask is None else example.mask.digest
    return [example.picture.digest, mask, example.caption, example.base_caption, example.identity]


def _mask_pictures(paths: Sequence[Path | None]) -> list[Picture | None]:
    return [None if path is None else Picture.from_file(path, as_mask=True) for path in paths]


def _mask_tensors(masks: Tensor | Sequence[Tensor | None]) -> list[Picture | None]:
    return [
        None if mask is None else Picture.from_tensor(mask, f"mask {index}", as_mask=True)
        for index, mask in enumerate(masks, start=1)
    ]
