"""Prompts to conditioning: the ids, the layers, the learned rows and what gradient they get."""

import pytest
import torch
from torch import nn

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.families import FAMILIES
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.adapters import TEXT_ATTENTION, add_lora
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.text import LearnedTokenEmbedding, PromptEncoder

START, END, A, DOG, AND = 49406, 49407, 320, 1929, 537
FIRST = 49408
TOKENS = (LearnedToken("<dog>", "dog", 2), LearnedToken("<dogs>", "cat"), LearnedToken("<style>", ""))
PROMPTS = ["a <dog> and <dogs>", "a <style> dog, in a long caption about nothing much"]


@pytest.fixture(params=FAMILIES)
def base(request, tiny_checkpoint):
    return open_base(tiny_checkpoint(request.param))


@pytest.fixture
def sdxl(tiny_checkpoint):
    return open_base(tiny_checkpoint("sdxl"))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return open_base(tiny_checkpoint("sd15")).tokenizer()


def encoder_of(base, tokenizer, tokens=TOKENS, **options):
    options = {"generator": torch.Generator().manual_seed(0)} | options
    return PromptEncoder(base.family, base.load_text_encoders(), tokenizer, tokens, **options)


def test_ids_of_triggers_and_padding(sdxl, tokenizer):
    encoder = encoder_of(sdxl, tokenizer)
    clip_l, clip_g = sdxl.family.encoders
    # <dog> owns ids 0 and 1 after the vocabulary, <dogs> id 2; the longer trigger wins over its beginning.
    expected = [START, A, FIRST, FIRST + 1, AND, FIRST + 2, END]
    assert encoder.token_ids("a <DOG> and <Dogs>", clip_l) == expected + [END] * 70
    assert encoder.token_ids("a <dog> and <dogs>", clip_g) == expected + [0] * 70
    assert encoder.token_ids("", clip_g) == [START, END] + [0] * 75


def test_unknown_triggers_stay_text(sdxl, tokenizer):
    encoder = encoder_of(sdxl, tokenizer)
    plain = tokenizer("a <cat> b")["input_ids"]
    assert encoder.token_ids("a <cat> b", sdxl.family.encoders[0])[: len(plain)] == plain


def test_long_captions_are_cut_with_one_warning(sdxl, tokenizer, recwarn):
    encoder = encoder_of(sdxl, tokenizer)
    exact, long = "dog " * 75, "dog " * 76
    slot = sdxl.family.encoders[0]
    assert encoder.token_ids(exact, slot) == [START] + [DOG] * 75 + [END]
    assert not [w for w in recwarn if "caption" in str(w.message)]
    with pytest.warns(UserWarning, match="76 tokens, of which 75 are read"):
        assert encoder.token_ids(long, slot) == encoder.token_ids(exact, slot)
    before = len(recwarn)
    encoder.token_ids(long, slot)
    assert len(recwarn) == before


def test_shapes_and_no_tokens(base, tokenizer):
    encoder = encoder_of(base, tokenizer, tokens=())
    widths = [component.config["hidden_size"] for component in base.text_encoders]
    result = encoder.encode(["a dog", ""])
    assert result.embeds.shape == (2, 77, sum(widths))
    assert (result.pooled is None) == (base.family.name != "sdxl")
    if result.pooled is not None:
        assert result.pooled.shape == (2, base.text_encoders[-1].config["projection_dim"])
    assert encoder.learned == encoder.context == {} and not result.embeds.requires_grad


def test_starting_rows(sdxl, tokenizer):
    encoder = encoder_of(sdxl, tokenizer)
    generator = torch.Generator().manual_seed(0)
    for key, learned in encoder.learned.items():
        table = encoder.table(key).float()
        assert learned.dtype == torch.float32
        torch.testing.assert_close(learned[:2].detach(), table[DOG].expand(2, -1))  # its last row repeats
        torch.testing.assert_close(learned[2].detach(), table[2368])  # "cat"
        noise = torch.randn(1, table.shape[1], generator=generator) * table.std()
        torch.testing.assert_close(learned[3:].detach(), noise)
    assert {key: leaf.shape for key, leaf in encoder.learned.items()} == {"clip_l": (4, 64), "clip_g": (4, 128)}


def test_a_token_that_starts_from_a_word_encodes_as_the_word(base, tokenizer):
    encoder = encoder_of(base, tokenizer, (LearnedToken("<x>", "dog"),), prompts=["a <x>"])
    learned, plain = encoder.encode(["a <x> runs"]), encoder.encode(["a dog runs"])
    torch.testing.assert_close(learned.embeds, plain.embeds)
    if plain.pooled is not None:
        # The pooled encoding sits at the end token, although the learned id is the highest.
        torch.testing.assert_close(learned.pooled, plain.pooled)


def test_given_rows_are_used_and_checked(sdxl, tokenizer):
    rows = {"clip_l": torch.ones(4, 64), "clip_g": torch.full((4, 128), 2.0)}
    encoder = encoder_of(sdxl, tokenizer, rows=rows)
    assert torch.equal(encoder.learned["clip_g"].detach(), rows["clip_g"])
    with pytest.raises(ConfigError, match=r"shape \(3, 64\); expected \(4, 64\)"):
        encoder_of(sdxl, tokenizer, rows=rows | {"clip_l": torch.ones(3, 64)})


@pytest.mark.parametrize(
    "tokens, message",
    [
        ((LearnedToken("<a>"), LearnedToken("<A>")), "used twice"),
        ((LearnedToken("<a>", "  "),), "has no tokens"),
    ],
)
def test_bad_tokens_are_refused(sdxl, tokenizer, tokens, message):
    with pytest.raises(ConfigError, match=message):
        encoder_of(sdxl, tokenizer, tokens)


def test_gradients_equal_those_of_a_whole_trained_table(base, tokenizer):
    """The rows' gradients, and the norm over all of them, against an ordinary, resized, trained table."""
    encoder = encoder_of(base, tokenizer, prompts=PROMPTS)
    weights = torch.randn(2, 77, encoder.encode(PROMPTS).embeds.shape[-1], generator=torch.Generator().manual_seed(1))
    result = encoder.encode(PROMPTS)
    loss = (result.embeds * weights).sum()
    (loss if result.pooled is None else loss + result.pooled.square().sum()).backward()

    reference = encoder_of(base, tokenizer, tokens=())
    tables = {}
    for slot, text_model in zip(base.family.encoders, reference.encoders):
        embedding = encoder.embeddings[slot.key]
        table = nn.Embedding.from_pretrained(torch.cat([embedding.weight, embedding.learned]).detach(), freeze=False)
        text_model.set_input_embeddings(table)
        tables[slot.key] = table
    # The ids of the learned rows come from the encoder that knows the triggers.
    reference.token_ids = encoder.token_ids
    expected = reference.encode(PROMPTS)
    torch.testing.assert_close(result.embeds, expected.embeds)
    loss = (expected.embeds * weights).sum()
    (loss if expected.pooled is None else loss + expected.pooled.square().sum()).backward()

    for slot in base.family.encoders:
        whole = tables[slot.key].weight.grad
        learned, context = encoder.learned[slot.key].grad, encoder.context[slot.key].grad
        torch.testing.assert_close(learned, whole[FIRST:])
        used = sorted({n for prompt in PROMPTS for n in encoder.token_ids(prompt, slot) if n < FIRST})
        assert len(context) == len(used) and whole[used].abs().sum(dim=1).min() > 0
        torch.testing.assert_close(context, whole[used])
        torch.testing.assert_close(torch.cat([learned, context]).norm(), whole.norm())
        assert encoder.table(slot.key).grad is None


def test_prompts_that_were_not_announced_read_the_table(base, tokenizer):
    with_tokens, without = encoder_of(base, tokenizer, prompts=["a <dog>"]), encoder_of(base, tokenizer, tokens=())
    torch.testing.assert_close(with_tokens.encode(["some cat"]).embeds, without.encode(["some cat"]).embeds)


def test_table_keeps_its_type_and_learned_rows_stay_float32():
    table = torch.randn(10, 4).to(torch.bfloat16)
    embedding = LearnedTokenEmbedding(table, torch.randn(2, 4), context_ids=[3, 7])
    ids = torch.tensor([[0, 3, 11, 7, 10]])
    output = embedding(ids)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output[0, [0, 1, 3]], table[[0, 3, 7]])
    torch.testing.assert_close(output[0, [2, 4]], embedding.learned[[1, 0]].to(torch.bfloat16))
    output.float().sum().backward()
    assert embedding.learned.grad.dtype == embedding.context.grad.dtype == torch.float32
    for leaf in (embedding.learned, embedding.context):
        assert torch.equal(leaf.grad, torch.ones(2, 4))
    assert embedding.weight.grad is None


def test_frozen_encodings_are_the_same_in_any_batch(base, tokenizer):
    encoder = encoder_of(base, tokenizer, tokens=())
    prompts = [f"picture number {number}" for number in range(5)]
    batched, whole = encoder.encode_frozen(prompts, batch_size=2), encoder.encode(prompts)
    torch.testing.assert_close(batched.embeds, whole.embeds)
    assert batched.embeds.device.type == "cpu" and not batched.embeds.requires_grad and len(batched) == 5
    again = batched[[4, 0, 0]]
    assert torch.equal(again.embeds, batched.embeds[[4, 0, 0]]) and (again.pooled is None) == (batched.pooled is None)


def test_text_encoders_take_a_lora_beside_learned_tokens(base, tokenizer):
    encoder = encoder_of(base, tokenizer, prompts=PROMPTS)
    before = encoder.encode(PROMPTS).embeds.detach()
    generator = torch.Generator().manual_seed(0)
    loras = [add_lora(text_model, 2, TEXT_ATTENTION, generator) for text_model in encoder.encoders]
    torch.testing.assert_close(encoder.encode(PROMPTS).embeds.detach(), before)
    encoder.encode(PROMPTS).embeds.square().sum().backward()
    for lora, component in zip(loras, base.text_encoders):
        # The penultimate layer of SDXL's encoders is the last that the loss can reach without the pooled text.
        reached = component.config["num_hidden_layers"] - (base.family.name == "sdxl")
        up = [value for name, value in lora.items() if ".lora_B." in name]
        assert sum(value.grad is not None and bool(value.grad.any()) for value in up) == 4 * reached
    assert all(leaf.grad is not None for leaf in encoder.learned.values())
