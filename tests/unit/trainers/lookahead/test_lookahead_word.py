"""The option to predict a word for the person, which prompts then name."""

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError, FormatError
from comfyui_personalize.models.lookahead.encoder import read_encoder
from comfyui_personalize.models.lookahead.word import WordHead
from comfyui_personalize.trainers.lookahead import sampling
from comfyui_personalize.trainers.lookahead.words import WordPrompts
from comfyui_personalize.trainers.text import PromptEncoder


def test_the_word_is_the_rows_own_and_nothing_else_changes(tiny):
    base = tiny.base()
    plain = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    prompts = ["a photo of <s*> in paris", "a dog", "<s*>"]
    before = plain.encode_frozen(prompts)
    words = WordPrompts(PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer()), base.tokenizer())
    given = [torch.randn(3, width, generator=torch.Generator().manual_seed(1)) for width in words.widths]
    given = [one.requires_grad_() for one in given]
    found = words(prompts, given)
    torch.testing.assert_close(found.embeds[1], before.embeds[1])  # the prompt without the word
    assert found.pooled.shape == before.pooled.shape
    gradients = torch.autograd.grad(found.embeds[0].sum() + found.pooled[0].sum(), given)
    for gradient in gradients:
        assert gradient[0].any() and not gradient[1:].any()
    other = words(prompts, [one.roll(1, 0) for one in given])
    assert not torch.allclose(other.embeds[0], found.embeds[0])


def test_a_head_is_learned_saved_and_learned_on(tiny, monkeypatch):
    monkeypatch.setattr(sampling, "LCM_STEPS", 1)
    settings = {"predict_word": True, "steps": 2, "preview_every": 2, "preview_steps": 1, "preview_people": 1}
    data = tiny.data(placeholder="{placeholder}", drawn={"validation_prompts": ("<s*> on the moon",)})
    first = tiny.train(data, name="first", **settings)
    head = read_encoder(first.files[0]).word
    features = torch.ones(1, head.layers[0].in_features, 2, 2)
    assert [one.shape[0] for one in head(features, [3, head.layers[2].out_features - 3])] == [1, 1]
    second = tiny.train(data, name="second", models={"start": first.files[0]}, **settings | {"preview_every": 0})
    before, after = load_file(first.files[0]), load_file(second.files[0])
    assert {name for name in before if name.startswith("word.")}
    assert before.keys() == after.keys() and not [name for name in before if torch.equal(before[name], after[name])]


def test_prompts_without_the_word_are_refused(tiny):
    with pytest.raises(ConfigError, match="predict_word needs prompts"):
        tiny.train(predict_word=True)
    with pytest.raises(FormatError, match="word is incomplete"):
        WordHead.from_tensors({"word.layers.2.weight": torch.zeros(3, 4)}, "half.safetensors")
    whole = {f"word.{key}": value * torch.nan for key, value in WordHead(4, 3).state_dict().items()}
    with pytest.raises(FormatError, match="are no numbers"):
        WordHead.from_tensors(whole, "bad.safetensors")
