"""Prompts as the authors' training encodes them."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfyui_personalize.models.families import SDXL
from comfyui_personalize.trainers.text import PromptEncoder


class RecordedPrompts(PromptEncoder):
    """Encodes prompts named by their row among the recorded ids."""

    ids: dict[str, torch.Tensor]

    def token_ids(self, prompt, slot):
        return self.ids[slot.key][int(prompt)].tolist()


def clip(kind, case, name: str):
    model = kind(CLIPTextConfig(**case.config[name]))
    weights = {key.removeprefix(f"{name}."): value for key, value in case.weights.items() if key.startswith(f"{name}.")}
    if not any(key.startswith("text_model.") for key in model.state_dict()):
        weights = {key.removeprefix("text_model."): weight for key, weight in weights.items()}
    model.load_state_dict(weights)
    return model.eval()


@pytest.mark.golden("lookahead", "16_*")
@torch.no_grad()
def test_prompts(case):
    encoders = [
        clip(CLIPTextModel, case, "text_encoder"),
        clip(CLIPTextModelWithProjection, case, "text_encoder_2"),
    ]
    prompts = RecordedPrompts(SDXL, encoders, None)
    recorded = (case.inputs["input_ids"], case.inputs["input_ids_2"])
    prompts.ids = {slot.key: ids for slot, ids in zip(SDXL.encoders, recorded, strict=True)}

    encoded = prompts.encode([str(row) for row in range(len(recorded[0]))])
    case.check("prompt_embeds", encoded.embeds)
    case.check("pooled", encoded.pooled)
