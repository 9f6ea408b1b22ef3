"""Several prompts for one batch of pictures."""

import math

import torch
from comfy_api.latest import io

from ..models.errors import ConfigError
from ._lines import lines_of


class PromptBatch(io.ComfyNode):
    """One conditioning with a row for each prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePromptBatch",
            display_name="Prompt Batch",
            category="personalize/data",
            description="Encodes one prompt per line, so that the pictures of a batch get a prompt each.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders, with learned tokens or without."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of a face\nan oil painting of a face",
                    tooltip="One prompt per line; empty lines do not count. Picture 1 of the batch gets line 1, and "
                    "so on.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="conditioning"),
                io.Int.Output(
                    display_name="count", tooltip="How many prompts there are: the batch size of the latent image."
                ),
            ],
        )

    @classmethod
    def execute(cls, clip, prompts) -> io.NodeOutput:
        lines = lines_of(prompts)
        if not lines:
            raise ConfigError("found no prompt, expected at least one line; write a prompt on each line")
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines]
        if any(len(schedule) != 1 for schedule in encoded):
            raise ConfigError(
                "the CLIP changes during the sampling (hooks), which prompts of a batch cannot; encode them one by one"
            )
        embeds, options = zip(*(schedule[0] for schedule in encoded))
        # As the host joins prompts of different lengths: repeated, since every key twice is the same attention.
        length = math.lcm(*(rows.shape[1] for rows in embeds))
        joined = torch.cat([rows.repeat(1, length // rows.shape[1], 1) for rows in embeds])
        pooled = [option.get("pooled_output") for option in options]
        shared = dict(options[0])
        if all(rows is not None for rows in pooled):
            shared["pooled_output"] = torch.cat(pooled)
        return io.NodeOutput([[joined, shared]], len(lines))
