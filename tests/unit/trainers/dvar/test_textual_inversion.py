"""Textual Inversion on tiny checkpoints: only new rows train, exactly resumable, stopped by DVAR."""

import json

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.dvar import EvaluationSettings
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.learned_embeddings import read_learned_embeddings
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers import loop
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.dvar import textual_inversion
from comfyui_personalize.trainers.dvar.config import TextualInversionConfig
from comfyui_personalize.trainers.optimizer import ParameterGroup, make_optimizer
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.stopping import DVAR
from comfyui_personalize.trainers.text import LearnedTokenEmbedding

DOG = LearnedToken("<dog>", "dog")
WIDTHS = {"sd15": {"clip_l": 64}, "sd21": {"clip_h": 128}, "sdxl": {"clip_l": 64, "clip_g": 128}}


@pytest.fixture
def train(tiny):
    def run(*arguments, **keywords):
        return tiny.train(textual_inversion, TextualInversionConfig, *arguments, **keywords)

    return run


@pytest.fixture
def models(monkeypatch):
    """Every model that a training loads, with copies of its weights as they came."""
    seen = []

    def watch(load):
        def wrapped(*arguments):
            loaded = load(*arguments)
            for model in loaded if isinstance(loaded, list | tuple) else [loaded]:
                seen.append((model, {key: value.clone() for key, value in model.state_dict().items()}))
            return loaded

        return wrapped

    for name in ("load_unet", "load_text_encoders"):
        monkeypatch.setattr(TrainingBase, name, watch(getattr(TrainingBase, name)))
    return seen


def tokens_of(result):
    return [load_file(path) for path in result.files]


def equal(first, second):
    pairs = zip(tokens_of(first), tokens_of(second), strict=True)
    return all(one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one) for one, two in pairs)


class CancelAt(SilentProgress):
    def __init__(self, step):
        self.step, self.flag = step, False

    def report(self, step, total, message="", preview=None):
        self.flag = self.flag or (step == self.step and message.startswith("loss"))

    def cancelled(self):
        return self.flag


@pytest.mark.parametrize("family", WIDTHS)
def test_only_the_new_rows_train(family, tiny, train, models, monkeypatch):
    optimizers, make = [], loop.make_optimizer
    monkeypatch.setattr(loop, "make_optimizer", lambda *a: optimizers.append(make(*a)) or optimizers[-1])
    tokens = LearnedToken("<dog>", "dog", rows=3), LearnedToken("<odd>", "")
    result = train(family, tiny.dataset(*tokens))
    assert [path.name for path in result.files] == ["my_dog_dog.safetensors", "my_dog_odd.safetensors"]
    for rows, stored in zip((3, 1), tokens_of(result)):
        assert {key: tuple(value.shape) for key, value in stored.items()} == {
            key: (rows, width) for key, width in WIDTHS[family].items()
        }
    state = [value for kept in optimizers[0].state.values() for value in kept.values() if value.ndim]
    assert {tuple(value.shape) for value in state} == {(4, width) for width in WIDTHS[family].values()}
    for model, before in models:
        learned = {
            name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.numel()
        }
        assert not learned
        after = model.state_dict()
        changed = {key for key in before if key in after and not torch.equal(before[key], after[key])}
        assert not changed
    (written,) = {path.parent.name for path in result.files}
    assert written == "embeddings" and not (tiny.folder / "out" / "main").exists()
    header = read_header(result.files[0])
    assert header.format == "embedding/1" and header.metadata["personalize.method"] == "textual-inversion"


def test_the_loss_falls_on_a_fixed_batch(train):
    rule = DVAR(window=1000, every=1, evaluation=EvaluationSettings(batch_size=3, mean_latent=True))
    losses = [loss for _, loss in train(steps=30, learning_rate=2e-2, stopping=rule).train.evaluations]
    assert losses[-1] < losses[0] and min(losses) < 0.999 * losses[0]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cancel_and_resume_equal_one_run(family, train):
    settings = {"steps": 5, "offset_noise": 0.1, "crop": "random", "flip": True}
    whole = train(family, name="whole", **settings)
    part = train(family, name="parts", progress=CancelAt(2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = train(family, name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)


def test_dvar_stops_it(train):
    # The window's share of the whole variance is below 1 as soon as the loss has once changed more than now.
    rule = DVAR(window=3, eps=1.0, every=1, evaluation=EvaluationSettings(batch_size=3))
    result = train(steps=40, stopping=rule)
    assert result.train.stopped_by == "rule" and 4 <= result.train.steps < 40


@pytest.mark.parametrize("prompts", ["captions", "object", "style"])
def test_prompts_name_the_token_and_its_class(prompts, tiny, train, monkeypatch):
    from comfyui_personalize.trainers.text import PromptEncoder

    seen, encode = [], PromptEncoder.encode
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, names: seen.extend(names) or encode(self, names))
    dataset = tiny.dataset(DOG, captions="my <dog> there")
    train(dataset=dataset, prompts=prompts, class_word="puppy", steps=4)
    seen = [prompt for prompt in seen if prompt]
    if prompts == "captions":
        assert set(seen) == {"my <dog> there"}
    else:
        assert all(prompt.endswith("<dog> puppy") for prompt in seen) and len(set(seen)) > 3
        assert all(("in the style of" in prompt) == (prompts == "style") for prompt in seen)


def test_bf16_keeps_the_rows_in_full_precision(train, models):
    result = train("sdxl", precision="bf16", preview_every=3, preview_steps=2)
    embeddings = [model.get_input_embeddings() for model, _ in models if hasattr(model, "get_input_embeddings")]
    learned = [e.learned.dtype for e in embeddings if isinstance(e, LearnedTokenEmbedding)]
    assert learned == [torch.float32] * 2
    assert result.preview.size == (64, 64)
    assert all(value.isfinite().all() for stored in tokens_of(result) for value in stored.values())


def test_the_file_reads_as_the_token(train):
    (path,) = train().files
    (found,) = read_learned_embeddings(path)
    assert found.trigger == "<dog>" and set(found.rows) == {"clip_l"}


@pytest.mark.parametrize("widths", [(768,), (1024,), (768, 1280)], ids=["sd15", "sd21", "sdxl"])
def test_no_optimizer_state_at_full_size_but_for_the_rows(widths):
    tables = [torch.empty(49408, width, device="meta") for width in widths]
    embeddings = [LearnedTokenEmbedding(table, torch.empty(2, table.shape[1], device="meta")) for table in tables]
    learned = {str(index): embedding.learned for index, embedding in enumerate(embeddings)}
    optimizer = make_optimizer(TextualInversionConfig(), [ParameterGroup("tokens", learned, 1e-3, 1e-2)], Ranks())
    for embedding in embeddings:
        embedding(torch.zeros(1, 77, dtype=torch.long, device="meta")).sum().backward()
    optimizer.step()
    assert all(embedding.weight.grad is None for embedding in embeddings)
    assert all(embedding.weight.data_ptr() == table.data_ptr() for embedding, table in zip(embeddings, tables))
    kept = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    gradients = sum(p.grad.numel() for e in embeddings for p in e.parameters() if p.grad is not None)
    assert sum(value.numel() for value in kept) == 2 * 2 * sum(widths)  # AdamW's two means
    assert gradients == 2 * sum(widths)


def test_what_it_cannot_train_is_refused(tiny, train):
    with pytest.raises(ConfigError, match="trains tokens, and the dataset has none; give one, such as <dog>"):
        train(dataset=tiny.dataset())
    with pytest.raises(ConfigError, match="leaves the model as it is, so that there is no class to preserve"):
        train(dataset=tiny.dataset(DOG, class_caption="a dog"))
    with pytest.raises(ConfigError, match=r"<odd> starts from 'a red dog', which has \d tokens, and has 1 row"):
        train(dataset=tiny.dataset(LearnedToken("<odd>", "a red dog")))
    train()
    with pytest.raises(ConfigError, match="exists already in embeddings"):
        train()
    assert json.loads(read_header(tiny.place().embedding_path(DOG, [DOG])).metadata["personalize.config"])["steps"] == 3
