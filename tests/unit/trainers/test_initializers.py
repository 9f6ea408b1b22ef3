"""The words that tokens start from: ranked by a tiny CLIP, drawn at random, put into the dataset."""

import pytest
import torch
from PIL import Image

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.templates import templates
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.initializers import InitializerSettings, choose_initializers, single_token_words
from comfyui_personalize.trainers.settings import DatasetSettings
from comfyui_personalize.trainers.tokenizer import load_tokenizer

WORDS = ("dog", "cat", "an old teapot", "statue", "boat", "lamp")
DOG, CAT = LearnedToken("<dog>", "thing", rows=2), LearnedToken("<cat>", "animal")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two pictures without text files."""
    path = tmp_path_factory.mktemp("pictures")
    for index, colour in enumerate(((200, 30, 20), (10, 90, 220))):
        Image.effect_noise((40 + index, 36), 90).convert("RGB").save(path / f"{index}.png")
        picture = Image.open(path / f"{index}.png")
        Image.blend(picture, Image.new("RGB", picture.size, colour), 0.7).save(path / f"{index}.png")
    return path


@pytest.fixture
def dataset(folder):
    return Dataset.from_folder(folder, tokens=(DOG, CAT), captions=["a <dog> here", "the <cat> there"])


def test_words_are_ranked_by_their_similarity_to_the_token_s_own_pictures(dataset, tiny_clip):
    settings = InitializerSettings(clip=tiny_clip, words=WORDS, seed=4)
    judge = settings.open()
    told = []
    made, choices = choose_initializers(dataset, settings, judge=judge, advance=lambda *done: told.append(done))
    assert told == [(24, 24)]
    import random

    sentences = random.Random(4).sample(templates("object"), 4)
    for place, (choice, token) in enumerate(zip(choices, made.tokens, strict=True)):
        seen = judge.embed_images([dataset.examples[place].picture.open().rgb])
        expected = {
            word: float(torch.cosine_similarity(judge.embed_texts([s.format(word) for s in sentences]), seen).mean())
            for word in WORDS
        }
        assert dict(choice.ranking) == pytest.approx(expected, abs=1e-5)
        scores = [score for _, score in choice.ranking]
        assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] > 0.01
        assert choice.word == token.initializer == choice.ranking[0][0] and choice.trigger == token.trigger
    assert choices[0].ranking != choices[1].ranking and made.tokens[0].rows == 2
    worst = choose_initializers(
        dataset, InitializerSettings(strategy="worst", clip=tiny_clip, words=WORDS), judge=judge
    )
    assert [choice.word for choice in worst[1]] == [choice.ranking[-1][0] for choice in worst[1]]


def test_base_captions_follow_unless_they_were_given(folder, tiny_clip):
    bases = [None, "the animal over there"]
    captions = ["a <dog> here", "the <cat> there"]
    dataset = Dataset.from_folder(folder, tokens=(DOG, CAT), captions=captions, base_captions=bases)
    settings = InitializerSettings(strategy="random", words=("boat",))
    made, _ = choose_initializers(dataset, settings, judge=None)
    assert [example.base_caption for example in made.examples] == ["a boat here", "the animal over there"]
    assert dataset.tokens[0].initializer == "thing" and made.fingerprint != dataset.fingerprint


def test_a_random_word_needs_no_clip_and_keeps_to_its_seed(dataset):
    def drawn(seed):
        settings = InitializerSettings(strategy="random", words=WORDS, seed=seed)
        return [choice.word for choice in choose_initializers(dataset, settings, judge=settings.open())[1]]

    assert drawn(1) == drawn(1) and len({tuple(drawn(seed)) for seed in range(8)}) > 2
    assert all(word in WORDS for seed in range(8) for word in drawn(seed))


def test_candidates_are_the_words_that_are_one_token():
    tokenizer = load_tokenizer()
    words = single_token_words(tokenizer)
    assert 20_000 < len(words) == len(set(words)) and {"dog", "cat", "statue"} <= set(words)
    assert "photographically" not in words and not any(word != word.strip().lower() for word in words)
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in words[::500])


def test_what_cannot_be_chosen_is_refused(folder):
    with pytest.raises(ConfigError, match="strategy best needs a CLIP; give the folder of one"):
        InitializerSettings()
    with pytest.raises(ConfigError, match="strategy must be best, worst or random, got 'luck'"):
        InitializerSettings(strategy="luck")
    plain = Dataset.from_folder(folder, captions="a dog")
    with pytest.raises(ConfigError, match="no tokens, so there is no word to start from"):
        choose_initializers(plain, InitializerSettings(strategy="random", words=WORDS), judge=None)


def test_the_command_line_chooses_too(folder, capsys):
    settings = InitializerSettings(strategy="random", words=("lamp",))
    dataset = DatasetSettings(folder=folder, captions=("a <dog>",), tokens=(DOG,), initializer=settings).open()
    assert dataset.tokens[0].initializer == "lamp" and dataset.examples[0].base_caption == "a lamp"
    assert capsys.readouterr().out == "<dog> starts from lamp\n"
