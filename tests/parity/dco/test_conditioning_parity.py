"""What the UNet is told about prompt and size, against the authors' encoding functions."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from comfyui_personalize.models.families import SDXL
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.cache import LatentCache
from comfyui_personalize.trainers.pictures import Cut
from comfyui_personalize.trainers.text import PromptEncoder

RECORDED_SETTINGS = (
    "vocab_size hidden_size intermediate_size projection_dim num_hidden_layers num_attention_heads "
    "max_position_embeddings layer_norm_eps hidden_act bos_token_id pad_token_id"
).split()


class RecordedPrompts(PromptEncoder):
    """Encodes prompts named by their row among the recorded ids."""

    ids: dict[str, torch.Tensor]

    def token_ids(self, prompt, slot):
        return self.ids[slot.key][int(prompt)].tolist() if prompt else []


def clip(kind, case, index: int, end: int):
    """The case's encoder; its vocabulary stops after ``end``, the last id that is no added token."""
    recorded = case.config[f"encoder_{index}"]
    settings = {name: recorded[name] for name in RECORDED_SETTINGS}
    model = kind(CLIPTextConfig(**settings, eos_token_id=end))
    weights = {k.removeprefix(f"e{index}."): v for k, v in case.weights.items() if k.startswith(f"e{index}.")}
    if not any(name.startswith("text_model.") for name in model.state_dict()):
        weights = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    model.load_state_dict(weights)
    return model.eval()


def encode(case, pool_at: int):
    """Prompt and pooled embeddings, with every id after the end token held as a learned row.

    Args:
        pool_at: end token's id as the encoders' settings give it; 2 makes transformers take the highest id.
    """
    end = case.config["eos_id_used_in_prompts"]
    encoders = [clip(CLIPTextModel, case, 0, pool_at), clip(CLIPTextModelWithProjection, case, 1, pool_at)]
    rows = {}
    for slot, encoder in zip(SDXL.encoders, encoders, strict=True):
        table = encoder.get_input_embeddings()
        rows[slot.key] = table.weight.detach()[end + 1 :].clone()
        encoder.set_input_embeddings(torch.nn.Embedding.from_pretrained(table.weight.detach()[: end + 1]))
    tokens = [LearnedToken("<added>", rows=len(rows["clip_l"]))] if len(rows["clip_l"]) else []
    prompts = RecordedPrompts(SDXL, encoders, None, tokens, rows=rows)
    prompts.ids = {slot.key: case.inputs[f"input_ids_{i}"] for i, slot in enumerate(SDXL.encoders)}
    return prompts.encode([str(row) for row in range(len(case.inputs["input_ids_0"]))])


@pytest.mark.golden("dco", "encode_prompt_two_encoders")
@torch.no_grad()
def test_prompts(case):
    theirs = encode(case, pool_at=case.config["eos_token_id_in_config"])
    case.check("prompt_embeds", theirs.embeds)
    case.check("pooled", theirs.pooled)

    ours = encode(case, pool_at=case.config["eos_id_used_in_prompts"])
    case.check("prompt_embeds", ours.embeds)
    case.check_background("pooled_at_eos", ours.pooled)


@pytest.mark.golden("dco", "sdxl_time_ids")
def test_sizes(case):
    side, batch = case.config["resolution"], case.config["batch"]
    place = case.config["crop_top"], case.config["crop_left"]
    picture = SimpleNamespace(name="picture")
    cut = Cut(torch.zeros(3, side, side), None, (side, side), place)
    example = SimpleNamespace(picture=picture, open=lambda: SimpleNamespace(cut=lambda *_, **__: cut))
    vae = SimpleNamespace(encode_moments=lambda images: (torch.zeros(1, 4, 1, 1), None))
    for mode in ("true", "square") if place == (0, 0) else ("true",):
        cache = LatentCache.build([example], vae, size=side, size_conditioning=mode)
        sizes = [cache.sample(0, torch.Generator()).time_ids for _ in range(batch)]
        case.check("one", torch.tensor(sizes[:1], dtype=torch.float32))
        case.check("batch", torch.tensor(sizes, dtype=torch.float32))
        case.check("batch_prior", torch.tensor(sizes, dtype=torch.float32))
