"""Masks of what the pictures of a training set are about, found by its name."""

import logging
from dataclasses import replace

from comfy_api.latest import io

from ..models.errors import ConfigError
from ..trainers.dataset import Example
from ..trainers.pictures import Picture
from . import _host, _sockets
from ._choices import known, single
from ._folders import SEGMENTERS
from ._network_folders import NONE, chosen_folder, folder_input, folder_version, network_folders

_UNSURE = 0.1
"""Largest value of a mask below which the subject was probably not found."""


class SoftSubjectMasks(io.ComfyNode):
    """A soft mask of the subject for each picture, by CLIPSeg."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSoftSubjectMasks",
            display_name="Soft Subject Masks",
            category="personalize/data",
            description="Finds the subject in each picture by its name, with CLIPSeg, and makes a soft mask of it: "
            "training then learns from the subject alone.",
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                folder_input(
                    "clipseg_folder",
                    network_folders(SEGMENTERS, "clipseg"),
                    "CLIPSeg in transformers' layout, a folder in models/clipseg. The authors use what is "
                    "CIDAS/clipseg-rd64-refined there. Nothing is downloaded.",
                ),
                io.String.Input(
                    "subject",
                    default="dog",
                    tooltip="What to look for, in ordinary words: the superclass, not the new word.",
                ),
                io.String.Input(
                    "templates",
                    default="",
                    multiline=True,
                    tooltip="Prompts whose masks are averaged, one per line, with {} for the subject. Empty takes the "
                    "authors' nine.",
                ),
                _sockets.Pictures.Input("pictures", optional=True, tooltip="The last Training Picture of a chain."),
                io.Image.Input(
                    "images", optional=True, tooltip="In place of a chain: a batch or a list of pictures, any sizes."
                ),
            ],
            outputs=[
                _sockets.Pictures.Output(
                    display_name="pictures", tooltip="The pictures with their masks, for Personalization Dataset."
                ),
                io.Mask.Output(
                    display_name="masks",
                    is_output_list=True,
                    tooltip="One mask per picture, as large as it, 0 to 1: how likely the subject is at each pixel.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, clipseg_folder=None) -> bool | str:
        name = single(clipseg_folder)
        return _NO_FOLDER if name == NONE else known("CLIPSeg folder", name, network_folders(SEGMENTERS, "clipseg"))

    @classmethod
    def fingerprint_inputs(cls, clipseg_folder=None, **_others) -> str:
        name = single(clipseg_folder)
        return folder_version(network_folders(SEGMENTERS, "clipseg").get(name))

    @classmethod
    def execute(cls, clipseg_folder, subject, templates, pictures=None, images=None) -> io.NodeOutput:
        if (pictures is None) == (images is None):
            count = "no place" if pictures is None else "two places (pictures, images)"
            raise ConfigError(f"pictures come from {count}; connect a chain of Training Picture, or images")
        if clipseg_folder[0] == NONE:
            raise ConfigError(_NO_FOLDER)
        from ..trainers.perfusion.masks import load_segmenter, subject_prompts

        prompts = subject_prompts(subject[0], templates[0])
        if images is None:
            examples = [example for chain in pictures for example in chain]
        else:
            shown = enumerate(_host.image_list(images), 1)
            examples = [Example(Picture.from_tensor(one, f"picture {number}"), "", "") for number, one in shown]
        if not examples:
            raise ConfigError("there are no pictures; connect at least one")
        progress = _host.HostProgress(cls.hidden.unique_id, len(examples))
        masks = []
        with _host.short_paths(), _host.memory_given_back():
            folder = chosen_folder(network_folders(SEGMENTERS, "clipseg"), clipseg_folder[0])
            segmenter = load_segmenter(folder, _host.tokenizer_folder())
            segmenter.network.to(_host.device_with_room(segmenter.network))
            opened = (example.picture.open().rgb for example in examples)
            for example, mask in zip(examples, segmenter.masks(opened, prompts)):
                masks.append(mask)
                progress.report(len(masks), len(examples), _found(example.picture.name, subject[0], float(mask.max())))
                progress.raise_if_cancelled()
        masked = [
            replace(example, mask=Picture.from_tensor(mask, f"mask of {example.picture.name}", as_mask=True))
            for example, mask in zip(examples, masks)
        ]
        return io.NodeOutput(tuple(masked), [mask.unsqueeze(0) for mask in masks])


_NO_FOLDER = (
    "there is no CLIPSeg to look with: choose a clipseg_folder; put config.json, model.safetensors, "
    "preprocessor_config.json and the tokenizer's files of CIDAS/clipseg-rd64-refined into models/clipseg/<name>"
)


def _found(name: str, subject: str, likely: float) -> str:
    """How sure the network is of the subject, as a line; said in the log, too, when it is not."""
    line = f"{name}: {subject} at most {likely:.0%} likely"
    if likely < _UNSURE:
        logging.warning("%s; look at its mask, name the subject otherwise, or paint the mask", line)
    return line
