"""Perfusion training on tiny checkpoints, from pictures to the concept."""

import json
import math

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError, IncompatibleModelError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.perfusion import VALUE, read_concept
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.checkpoint import newest_states
from comfyui_personalize.trainers.perfusion import train
from comfyui_personalize.trainers.perfusion.prompts import TEMPLATES, PromptDraws
from comfyui_personalize.trainers.plateau import CLIPPlateau, PictureSettings
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.rank_one_edits import cross_projections
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.stopping import DVAR
from comfyui_personalize.trainers.text import PromptEncoder

LOADS = ("load_unet", "load_vae", "load_text_encoders")


class CancelAt(SilentProgress):
    """The user cancels when a report of this step starts with this message."""

    def __init__(self, message=None, step=None):
        self.message, self.step, self.flag, self.previews = message, step, False, []

    def report(self, step, total, message="", preview=None):
        if preview is not None:
            self.previews.append(step)
        if self.message is not None and message.startswith(self.message) and self.step in (None, step):
            self.flag = True

    def cancelled(self):
        return self.flag


@pytest.fixture
def inside(monkeypatch):
    """What trainings of this test did: lists of UNets, batches, prompts, states of the concept."""
    seen = {"unets": [], "batches": [], "prompts": [], "concepts": [], "encoders": []}
    load, following, shown = TrainingBase.load_unet, LatentBatches.next, PromptDraws.next
    load_encoders, concept = TrainingBase.load_text_encoders, train.TrainedConcept

    def keep(place, value):
        seen[place].append(value)
        return value

    monkeypatch.setattr(TrainingBase, "load_unet", lambda *a: keep("unets", load(*a)))
    monkeypatch.setattr(TrainingBase, "load_text_encoders", lambda *a: keep("encoders", load_encoders(*a)))
    monkeypatch.setattr(LatentBatches, "next", lambda self: keep("batches", following(self)))
    monkeypatch.setattr(PromptDraws, "next", lambda self, draws: keep("prompts", shown(self, draws)))
    monkeypatch.setattr(train, "TrainedConcept", lambda *a, **k: keep("concepts", concept(*a, **k)))
    return seen


def tensors(result):
    concept = read_concept(result.files[0])
    parts = concept.parts
    return {**concept.embedding.rows, **parts.outputs, "input": parts.target_input, "super": parts.superclass_input}


def equal(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The course of training


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_loss_falls_on_a_fixed_batch(family, tiny, monkeypatch):
    first = []
    following = LatentBatches.next
    monkeypatch.setattr(
        LatentBatches, "next", lambda self: first[0] if first else first.append(following(self)) or first[0]
    )
    result = tiny.train(family, steps=12, prompts="captions", ema_decay=0.9)
    losses = result.train.losses
    assert losses[-1] < 0.95 * losses[0]
    assert all(later < losses[0] for later in losses[3:])


def test_a_concept_starts_where_the_edit_changes_nothing_of_the_superclass(tiny, inside):
    """At the word's own row, with the gate wide open, the edited projections are the plain ones."""
    tiny.train(steps=1, prompts="captions", batch_size=1, beta=-1e9, learning_rate=1e-9, embedding_learning_rate=1e-9)
    assert torch.equal(inside["batches"][0].latents, inside["batches"][1].latents)  # it starts from the first batch
    base, concept = tiny.base(), inside["concepts"][0]
    with torch.no_grad():
        encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
        embeds = encoder.encode(["a photo of teddy"]).embeds
        torch.testing.assert_close(concept.target_input.detach(), embeds[0, 4], rtol=1e-5, atol=1e-6)
        plain = cross_projections(base.load_unet())
        for name, module in cross_projections(inside["unets"][0]).items():
            edited, expected = module(embeds), plain[name](embeds)
            torch.testing.assert_close(edited[0, 4], expected[0, 4], rtol=1e-4, atol=1e-4, msg=name)
            assert not torch.allclose(edited[0, 2], expected[0, 2], rtol=1e-2, atol=1e-2), name


def test_only_the_new_rows_and_the_values_outputs_are_trained(tiny, inside):
    tiny.train(steps=2)
    base = tiny.base()
    unet, (encoder,) = inside["unets"][0], inside["encoders"][0]
    for name, parameter in base.load_unet().named_parameters():
        assert torch.equal(parameter, dict(unet.named_parameters())[name]), name
    plain = base.load_text_encoders()[0]
    trained = dict(encoder.named_parameters())
    changed = {name for name, value in plain.named_parameters() if name not in trained}
    assert all(torch.equal(value, trained[name]) for name, value in plain.named_parameters() if name in trained)
    assert changed <= {"text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"}
    table = encoder.get_input_embeddings()
    assert torch.equal(table.weight, plain.get_input_embeddings().weight)
    outputs = inside["concepts"][0].groups[0].parameters
    assert outputs and all(name.endswith(VALUE) for name in outputs)
    start = table.weight[base.tokenizer()("teddy", add_special_tokens=False)["input_ids"]].float()
    assert not torch.equal(table.learned.detach(), start)


def test_keys_keep_the_superclass_and_values_leave_it(tiny, inside):
    result = tiny.train(steps=3)
    parts = read_concept(result.files[0]).parts
    unet = tiny.base().load_unet()
    for name, module in cross_projections(unet).items():
        answer = module(parts.superclass_input)
        if name.endswith(VALUE):
            assert (parts.outputs[name] - answer).abs().max() > 0.01
        else:
            assert name not in parts.outputs
    dual = tiny.covariance().dual(parts.target_input)
    torch.testing.assert_close(parts.dual, dual, rtol=1e-5, atol=1e-6)


def test_accumulation_equals_a_larger_batch(tiny):
    """As long as the target input stands still: it moves in every micro-batch."""
    settings = {"steps": 2, "prompts": "captions", "ema_decay": 0.9999999, "max_grad_norm": 0.0, "flip": False}
    draws = []
    following = LatentBatches.next

    def replaying(self):
        batch = following(self)
        draws.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentBatches, "next", replaying)
        large = tiny.train(name="large", batch_size=4, **settings)
    halves = [half for batch in draws for half in (part(batch, slice(0, 2)), part(batch, slice(2, 4)))]
    halves = [*halves[:1], *halves[2:]]  # of the batch that the concept starts from, one is enough
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentBatches, "next", lambda self: halves.pop(0))
        small = tiny.train(name="small", batch_size=2, gradient_accumulation=2, **settings)
    assert small.train.losses == pytest.approx(large.train.losses, rel=1e-4)
    for name, value in tensors(large).items():
        torch.testing.assert_close(tensors(small)[name], value, rtol=1e-3, atol=1e-4, msg=name)


def part(batch, rows):
    from dataclasses import replace

    values = {
        name: getattr(batch, name)[rows] for name in ("draws", "latents", "noise", "timesteps", "time_ids", "masks")
    }
    return replace(batch, **values)


def test_the_target_input_follows_the_word_in_every_micro_batch(tiny, inside):
    tiny.train(steps=1, gradient_accumulation=3, ema_decay=0.5, batch_size=1, learning_rate=1e-6, prompts="captions")
    base, concept = tiny.base(), inside["concepts"][0]
    embeds = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer()).encode(["a photo of teddy"])
    torch.testing.assert_close(concept.target_input, embeds.embeds[0, 4], rtol=1e-5, atol=1e-6)
    tiny.train(steps=2, ema_decay=0.0, embedding_learning_rate=0.5, batch_size=1, prompts="captions", name="fast")
    assert not torch.allclose(inside["concepts"][1].target_input, embeds.embeds[0, 4], rtol=0.01, atol=0.01)


# Prompts, pictures and masks


def test_templates_are_drawn_anew(tiny, inside):
    tiny.train(steps=6, batch_size=4)
    shown = [prompt for prompts in inside["prompts"] for prompt in prompts]
    assert len({prompt.text for prompt in shown}) > 5
    assert {prompt.text for prompt in shown} <= {template.format("<teddy>") for template in TEMPLATES}
    assert all(prompt.superclass == prompt.text.replace("<teddy>", "teddy") for prompt in shown)


def test_own_templates_and_captions(tiny, inside):
    tiny.train(steps=2, templates="a {} in the snow\n\n my {} ", name="a")
    assert {p.text for prompts in inside["prompts"] for p in prompts} <= {"a <teddy> in the snow", "my <teddy>"}
    inside["prompts"].clear()
    tiny.train(
        dataset=tiny.dataset(captions=[f"a <teddy> number {n}" for n in range(4)]),
        prompts="captions",
        steps=3,
        name="b",
    )
    drawn = [
        (d.example, p.text) for b, ps in zip(inside["batches"][3:], inside["prompts"]) for d, p in zip(b.draws, ps)
    ]
    assert drawn and all(text == f"a <teddy> number {example}" for example, text in drawn)
    for wrong in ("a teddy", "{} and {}"):
        with pytest.raises(ConfigError, match="has [02] places for the word; write {} in it once"):
            tiny.train(templates=wrong)


def test_masks_are_soft_and_flipped_with_the_pictures(tiny, inside):
    tiny.train(steps=8, batch_size=4)
    for batch in inside["batches"]:
        assert batch.masks.shape == (4, 1, 8, 8)
        # Scaled so that the brightest place of the cut, here 200 of 255, counts fully.
        assert 0 <= batch.masks.min() and 0.9 < batch.masks.max() <= 1
    rows = {}
    for batch in inside["batches"]:
        for draw, latents, mask in zip(batch.draws, batch.latents, batch.masks):
            rows.setdefault(draw.example, {})[latents.numpy().tobytes()] = mask
    mirrored = [list(found.values()) for found in rows.values() if len(found) == 2]
    assert mirrored
    for one, other in mirrored:
        assert not torch.allclose(one, other, atol=0.05)
        torch.testing.assert_close(one, other.flip(-1), rtol=0, atol=0.05)


def test_the_loss_is_of_the_subject_alone(tiny, inside):
    masked = tiny.train(steps=1, name="masked")
    whole = tiny.train(steps=1, name="whole", masked_loss=False)
    without = tiny.train(dataset=tiny.dataset(masks=False), steps=1, name="without")
    assert masked.train.losses[0] < whole.train.losses[0] == pytest.approx(without.train.losses[0], rel=1e-6)
    assert inside["batches"][0].masks is not None and inside["batches"][-1].masks is None


def test_a_word_of_several_rows_and_a_superclass_of_several_tokens(tiny, inside):
    token = LearnedToken("<bear>", "brown teddy bear", 3)
    result = tiny.train("sdxl", tiny.dataset(token), steps=2)
    concept = read_concept(result.files[0])
    assert {key: rows.shape for key, rows in concept.embedding.rows.items()} == {"clip_l": (3, 64), "clip_g": (3, 128)}
    assert concept.superclass == "brown teddy bear" and concept.trigger == "<bear>"


@pytest.mark.parametrize(
    ("superclass", "first", "place"), [("brown teddy bear", "brown teddy bear", 6), ("teddy", "teddy teddy teddy", 4)]
)
def test_the_target_input_is_that_of_the_last_of_several_rows(tiny, inside, superclass, first, place):
    token = LearnedToken("<bear>", superclass, 3)
    settings = {"ema_decay": 0.5, "batch_size": 1, "learning_rate": 1e-6, "prompts": "captions"}
    tiny.train(dataset=tiny.dataset(token), steps=1, **settings)
    base, (concept,) = tiny.base(), inside["concepts"]
    encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    embeds, plain = (encoder.encode([f"a photo of {words}"]).embeds[0] for words in (first, superclass))
    torch.testing.assert_close(concept.target_input, embeds[6], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(concept._superclass, plain[None, place], rtol=1e-5, atol=1e-6)


def test_an_output_for_each_position(tiny):
    paper = tiny.train(steps=2, name="paper", save_precision="fp16")
    positions = tiny.train(steps=2, name="positions", output_mode="positions")
    rows = {len(value) for value in read_concept(positions.files[0]).parts.outputs.values()}
    assert rows == {77} and len(read_concept(positions.files[0]).parts.superclass_input) == 77
    assert {len(value) for value in read_concept(paper.files[0]).parts.outputs.values()} == {1}
    assert 10 * paper.files[0].stat().st_size < positions.files[0].stat().st_size


def test_the_file_says_what_it_is(tiny):
    result = tiny.train(steps=1)
    header = read_header(result.files[0]).metadata
    assert json.loads(header["personalize.config"])["steps"] == 1
    concept = read_concept(result.files[0])
    assert (concept.family, concept.covariance) == ("sd15", tiny.covariance().fingerprint)


# Resume, best weights, stopping


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cancel_and_resume_equal_one_run(family, tiny):
    settings = {"steps": 5, "gradient_accumulation": 2, "crop": "random", "keep": "best", "offset_noise": 0.1}
    whole = tiny.train(family, name="whole", **settings)
    cut = tiny.train(family, name="parts", progress=CancelAt("loss", step=2), **settings)
    assert (cut.train.stopped_by, cut.train.steps) == ("cancelled", 2)
    assert cut.files[0].exists()
    rest = tiny.train(family, name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)


def test_cancel_within_a_step_takes_its_move_back(tiny, inside, monkeypatch):
    whole = tiny.train(name="whole", steps=3, gradient_accumulation=2)
    progress, calls, step = CancelAt(), [], train.perfusion_step

    def cancelling(*arguments, **keywords):
        calls.append(1)
        progress.flag = len(calls) == 3  # the first half of the second step
        return step(*arguments, **keywords)

    monkeypatch.setattr(train, "perfusion_step", cancelling)
    half = tiny.train(name="parts", steps=3, gradient_accumulation=2, progress=progress)
    assert half.train.steps == 1
    monkeypatch.setattr(train, "perfusion_step", step)
    rest = tiny.train(name="parts", steps=3, gradient_accumulation=2, resume=True)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)


def test_the_best_weights_come_with_their_target_input(tiny, inside):
    rule = DVAR(window=2, eps=1e-9, every=1)
    result = tiny.train(steps=5, keep="best", stopping=rule, embedding_learning_rate=0.2, ema_decay=0.3, name="best")
    scores = dict(result.train.evaluations)
    best = min((step for step in scores if step), key=scores.get)
    assert result.train.best_step == best
    until = tiny.train(steps=best, embedding_learning_rate=0.2, ema_decay=0.3, name="until")
    assert equal(result, until)


@pytest.mark.parametrize(("guidance", "prompts"), [(1.0, ["a photo of teddy"]), (3.0, ["", "a photo of teddy"])])
def test_locked_previews_show_keys_the_superclass_in_the_rows_with_the_word(tiny, monkeypatch, guidance, prompts):
    shown, make = [], train.LockedPreviews
    monkeypatch.setattr(train, "LockedPreviews", lambda *args: shown.append(args[2]) or make(*args))
    sampled = {"preview_every": 1, "preview_steps": 1, "preview_guidance": guidance}
    tiny.train(steps=1, prompts="captions", **sampled)
    base = tiny.base()
    encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    torch.testing.assert_close(shown[0], encoder.encode_frozen(prompts).embeds)


def test_evaluations_and_previews_do_not_change_the_course(tiny):
    progress = CancelAt()
    watched = tiny.train(
        name="a",
        steps=4,
        preview_every=2,
        preview_steps=2,
        progress=progress,
        stopping=DVAR(window=3, eps=1e-9, every=1),
    )
    plain = tiny.train(name="b", steps=4)
    assert watched.train.losses == plain.train.losses and equal(watched, plain)
    assert progress.previews == [2, 4] and len(watched.train.evaluations) == 4
    assert watched.preview.size == (128, 64)
    left, right = (watched.preview.crop((x, 0, x + 64, 64)).tobytes() for x in (0, 64))
    assert left != right  # global key locking is another picture


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_clip_plateau_stops_changes_nothing_and_resumes_exactly(family, tiny, tiny_clip):
    pictures = PictureSettings(clip=tiny_clip, count=3, steps=1)
    settings = {"steps": 20, "stopping": CLIPPlateau(pictures=pictures, patience=0, eps=1.0, every=2)}
    whole = tiny.train(family, name="whole", **settings)
    assert (whole.train.stopped_by, whole.train.steps) == ("rule", 4)
    assert len({value for _, value in whole.train.criterion.values}) == 2
    assert equal(whole, tiny.train(family, name="plain", steps=4))
    part = tiny.train(family, name="parts", progress=CancelAt("loss", 2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = tiny.train(family, name="parts", resume=True, **settings)
    assert rest.train.criterion == whole.train.criterion and equal(whole, rest)


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(tiny, monkeypatch):
    good = tiny.train(steps=2, name="good")
    steps, step = [], train.perfusion_step

    def breaking(*arguments, **keywords):
        steps.append(1)
        return step(*arguments, **keywords) * (math.nan if len(steps) == 3 else 1)

    monkeypatch.setattr(train, "perfusion_step", breaking)
    result = tiny.train(steps=9, name="bad")
    assert (result.train.stopped_by, result.train.steps) == ("nan", 2)
    assert equal(good, result)


def test_gradient_checkpointing_computes_the_same(tiny):
    plain = tiny.train(steps=2, name="plain")
    saving = tiny.train(steps=2, name="saving", gradient_checkpointing=True)
    assert saving.train.losses == pytest.approx(plain.train.losses, rel=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bf16_trains_in_full_precision(family, tiny, inside):
    result = tiny.train(family, precision="bf16", preview_every=3, preview_steps=2)
    assert {value.dtype for value in inside["concepts"][0].groups[0].parameters.values()} == {torch.float32}
    assert {value.dtype for value in inside["unets"][0].parameters()} == {torch.bfloat16}
    full = tiny.train(family, name="full")
    assert result.train.losses == pytest.approx(full.train.losses, rel=0.1)


# Refusals


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fail when a model is loaded."""
    for name in LOADS:
        monkeypatch.setattr(TrainingBase, name, lambda *arguments: pytest.fail("loaded a model"))


def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(tiny, loads_nothing):
    with pytest.raises(IncompatibleModelError, match="text encodings of width 192, those of .* are 64 wide; estimate"):
        tiny.train(covariance=tiny.covariance("sdxl"))
    two = tiny.dataset(LearnedToken("<a>", "cat"), LearnedToken("<b>", "dog"))
    with pytest.raises(ConfigError, match="one word per training, the dataset has 2"):
        tiny.train(dataset=two)
    nameless = tiny.dataset(LearnedToken("<a>", ""), base_captions="a photo")
    with pytest.raises(ConfigError, match="token <a> has no initializer; Perfusion starts from the superclass word"):
        tiny.train(dataset=nameless)
    with pytest.raises(ConfigError, match="no use for class pictures"):
        tiny.train(dataset=tiny.dataset().with_class_folder(tiny.pictures, "a teddy"))
    tiny.place().lora_path.parent.mkdir(parents=True)
    tiny.place().lora_path.write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="teddy.safetensors exists already in perfusion_concepts"):
        tiny.train()
    assert tiny.place().lora_path.read_bytes() == b"somebody's"
    assert not tiny.place().run_folder.exists()


def test_a_covariance_says_its_family(tiny, loads_nothing):
    covariance = tiny.covariance()
    covariance.metadata["personalize.family"] = "sd21"
    with pytest.raises(
        IncompatibleModelError, match="estimated for sd21, the base model is sd15; estimate one for sd15"
    ):
        tiny.train(covariance=covariance)


def test_a_resume_with_another_covariance_is_refused(tiny):
    tiny.train(steps=4, progress=CancelAt("loss", step=2))
    with pytest.raises(ConfigError, match="made with other settings"):
        tiny.train(steps=4, covariance=tiny.covariance(seed=1), resume=True)
    assert newest_states(tiny.place().run_folder)


def test_a_word_that_is_cut_off_is_refused(tiny):
    message = "does not contain the concept's token among the words that are read"
    with pytest.warns(UserWarning, match="of which 75 are read"), pytest.raises(DatasetError, match=message):
        tiny.train(templates="very " * 90 + "{}")


def test_ranks_share_one_concept(tiny):
    class Averaging(Ranks):
        """Both processes are this one."""

        index, count = 1, 2

    result = tiny.train(ranks=Averaging(), steps=2)
    assert (result.files, result.train.steps) == ((), 2)
    assert not tiny.folder.joinpath("out").exists()
