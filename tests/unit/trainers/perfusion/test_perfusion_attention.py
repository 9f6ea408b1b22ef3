"""What training moves in cross-attention: what the word's token brings there, and little of where it looks."""

import pytest
import torch

from comfyui_personalize.models.perfusion import edit_space, read_concept
from comfyui_personalize.models.tokens import LearnedToken, replace_triggers
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.rank_one_edits import RankOneEdits, cross_projections, project
from comfyui_personalize.trainers.text import PromptEncoder

PROMPT = "a photo of a <teddy> on a table"
ROW = 5  # start, a, photo, of, a, <teddy>
WORDS = {"<teddy>": "teddy"}


def token_attention(unet, embeds, row):
    """Layer -> (share of attention that the token gets, what it brings there), both of each pixel and head."""
    found, seen = {}, {}
    handles = []
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn2.to_k", "attn2.to_v")):
            handles.append(module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out)))
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predict(unet, noisy, torch.tensor([500]), Conditioning(embeds, None, None))
    for handle in handles:
        handle.remove()
    for name in {name.rpartition(".")[0] for name in seen}:
        heads = unet.get_submodule(name).heads
        q, k, v = (seen[f"{name}.{part}"][0].unflatten(1, (heads, -1)) for part in ("to_q", "to_k", "to_v"))
        share = torch.einsum("phd,thd->hpt", q, k).div(q.shape[-1] ** 0.5).softmax(-1)[..., row]
        found[name] = share, share.unsqueeze(-1) * v[row].unsqueeze(1)
    return found


@pytest.mark.parametrize("masks", [True, False])
def test_the_token_brings_something_else_after_training(tiny, masks):
    settings = {"prompts": "captions", "ema_decay": 0.9, "steps": 10, "embedding_learning_rate": 0.02}
    result = tiny.train(dataset=tiny.dataset(masks=masks), **settings)
    losses = result.train.losses
    assert len(losses) == 10
    concept, base, unet = read_concept(result.files[0]), tiny.base(), tiny.base().load_unet()
    token = LearnedToken(concept.trigger, concept.superclass)
    tools = base.family, base.load_text_encoders(), base.tokenizer()
    encoder = PromptEncoder(*tools, [token], rows=concept.embedding.rows)
    with torch.no_grad():
        taught, plain = (encoder.encode([text]).embeds for text in (PROMPT, replace_triggers(PROMPT, WORDS)))
    before = token_attention(unet, plain, ROW)
    outputs = {
        name: [concept.target_output(name, lambda rows, own=module: project(own, rows))]
        for name, module in cross_projections(unet).items()
    }
    edits = RankOneEdits(unet, edit_space([concept], [0.65], [0.15]), outputs)
    edits.superclass = plain
    after = token_attention(unet, taught, ROW)
    edits.remove()
    assert before.keys() == after.keys() and before
    brought = [relative(after[name][1], before[name][1]) for name in before]
    looked = [relative(after[name][0], before[name][0]) for name in before]
    assert min(brought) > 0.05
    assert sum(looked) < sum(brought)
    again = token_attention(unet, plain, ROW)
    assert all(torch.equal(again[name][1], before[name][1]) for name in before)


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())
