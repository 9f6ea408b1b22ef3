"""DCO training on tiny checkpoints, from pictures to files."""

import gc
import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from comfyui_personalize.models.errors import ConfigError, FormatError, TrainingError
from comfyui_personalize.models.formats import read_header
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers import sampling
from comfyui_personalize.trainers.adapters import lora_off
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.checkpoint import newest_states
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.dco import train
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks

LOADS = ("load_unet", "load_vae", "load_text_encoders")


class CancelAt(SilentProgress):
    """The user cancels when a report starts with this message, or when the test says so."""

    def __init__(self, message=None, step=None):
        self.message, self.step, self.flag = message, step, False
        self.messages, self.previews = [], []

    def report(self, step, total, message="", preview=None):
        self.messages.append(message)
        if preview is not None:
            self.previews.append(step)
        if self.message is not None and message.startswith(self.message) and self.step in (None, step):
            self.flag = True

    def cancelled(self):
        return self.flag


def tensors(result):
    return {name: value for path in result.files for name, value in load_file(path).items()}


def equal(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files_below(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def base_error(base, batch, prompts, rows=slice(None)):
    """Squared error of the untrained model on part of a batch, one number a row."""
    from comfyui_personalize.trainers.text import PromptEncoder

    encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    embeds = encoder.encode(prompts)
    sized = base.family.size_conditioning
    told = Conditioning(embeds.embeds, embeds.pooled, batch.time_ids[rows] if sized else None)
    latents, noise, timesteps = batch.latents[rows], batch.noise[rows], batch.timesteps[rows]
    prediction = predict(base.load_unet(), base.schedule.add_noise(latents, noise, timesteps), timesteps, told)
    target = base.schedule.target(latents, noise, timesteps)
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)


# The course of training

RECORDED = {
    # Seed 0, the settings of conftest.py. test_authors_procedure.py shows that a plain implementation of the
    # authors' procedure gives the same numbers as the code that these were recorded from.
    "sd15": [0.69314718, 0.67974228, 0.67268085, 0.68708092, 0.66976583],
    "sd21": [0.69314718, 0.54440206, 0.47253382, 0.46112129, 0.18755944],
    "sdxl": [0.69314718, 0.66472936, 0.64283669, 0.62672305, 0.57178527],
}


@pytest.mark.parametrize("family", RECORDED)
def test_first_five_losses(family, tiny):
    result = tiny.train(family, steps=5)
    assert result.train.losses[0] == pytest.approx(math.log(2), rel=1e-6)  # policy and reference still agree
    assert result.train.losses == pytest.approx(RECORDED[family], rel=1e-3)


def test_the_seed_decides(tiny):
    first, again, other = (tiny.train(name=str(n), seed=seed) for n, seed in enumerate((3, 3, 4)))
    assert first.train.losses == again.train.losses and equal(first, again)
    assert first.train.losses != other.train.losses


@pytest.mark.parametrize("beta", [-1, 0])
def test_without_beta_the_loss_is_the_plain_error(beta, tiny, inside):
    forwards = counted_forwards(inside)
    dataset = tiny.dataset()
    result = tiny.train(dataset=dataset, beta=beta, steps=1)
    assert forwards == [2]  # rows of the one forward pass: the reference is not computed
    batch = inside.batches[0]
    error = base_error(tiny.base(), batch, [dataset.examples[draw.example].caption for draw in batch.draws]).mean()
    assert result.train.losses == [pytest.approx(error.item(), rel=1e-5)]


def counted_forwards(inside):
    """List that receives the number of rows of every forward pass of the UNets that are yet to be loaded."""
    rows, load = [], TrainingBase.load_unet

    def load_unet(*arguments):
        unet = load(*arguments)
        unet.register_forward_pre_hook(lambda module, given: rows.append(len(given[0])))
        return unet

    TrainingBase.load_unet = load_unet  # put back by the fixture "inside", which patches the same name
    return rows


def test_a_step_is_two_forward_passes_and_no_other_encoding(tiny, inside):
    forwards = counted_forwards(inside)
    tiny.train(steps=3)
    assert forwards == [2, 2] * 3
    assert inside.encoded == 4  # each picture once, before training


def test_snr_weights_enter_the_loss(tiny, inside):
    dataset = tiny.dataset()
    for family in ("sd15", "sd21"):
        result = tiny.train(family, dataset, beta=-1, snr_gamma=5.0, steps=1, name=family)
        batch, base = inside.batches[-1], tiny.base(family)
        errors = base_error(base, batch, [dataset.examples[draw.example].caption for draw in batch.draws])
        alphas = base.schedule.alphas_cumprod[batch.timesteps]
        snr = alphas / (1 - alphas)
        weights = snr.clamp(max=5) / snr + (1 if family == "sd21" else 0)
        assert result.train.losses == [pytest.approx((errors * weights).mean().item(), rel=1e-5)]


def test_prior_preservation_adds_the_plain_loss_of_the_class(tiny, inside, class_pictures, dog):
    forwards = counted_forwards(inside)
    dataset = tiny.dataset(dog).with_class_folder(class_pictures, "a photo of a dog")
    result = tiny.train(dataset=dataset, prior_loss_weight=0.5, steps=2)
    assert forwards == [2, 4] * 2  # the reference sees the pictures of the subject alone
    errors = base_error(tiny.base(), inside.batches[0], ["a photo of a dog"] * 2, slice(2, 4))
    assert result.train.losses[0] == pytest.approx(math.log(2) + 0.5 * errors.mean().item(), rel=1e-5)
    assert inside.encoded == 4 + 3
    assert all(draw.class_example is not None for batch in inside.batches for draw in batch.draws)


def test_offset_noise_shifts_whole_channels(tiny, inside):
    dataset = tiny.dataset()
    for name, offset in (("without", 0.0), ("with", 0.5)):
        tiny.train(dataset=dataset, offset_noise=offset, steps=1, name=name)
    shift = inside.batches[1].noise - inside.batches[0].noise
    assert shift.abs().min() > 1e-4
    torch.testing.assert_close(shift, shift.mean((2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
    assert torch.equal(inside.batches[0].latents, inside.batches[1].latents)


def test_random_crops_and_flips_are_encoded_once(tiny, inside):
    dataset = tiny.dataset()
    result = tiny.train(dataset=dataset, crop="random", crop_variants=3, flip=True, steps=8)
    assert 4 * 2 < inside.encoded <= 4 * 3 * 2  # a cut that is drawn twice is encoded once
    seen = {latents.numpy().tobytes() for batch in inside.batches for latents in batch.latents}
    assert len(seen) > 4
    assert tiny.train(dataset=dataset, crop="random", crop_variants=3, flip=True, steps=8, name="b").train.losses == (
        result.train.losses
    )


def test_accumulation_takes_several_batches_a_step(tiny, inside):
    result = tiny.train(steps=2, gradient_accumulation=3, batch_size=1)
    assert (len(inside.batches), result.train.steps) == (6, 2)


# What is trained


def test_a_style_needs_no_token_and_no_text_encoder(tiny, monkeypatch):
    alive, during = [], []
    load, following = TrainingBase.load_text_encoders, LatentBatches.next

    def load_text_encoders(*arguments):
        encoders = load(*arguments)
        alive.extend(weakref.ref(encoder) for encoder in encoders)
        return encoders

    def next_batch(batches):
        during.append([reference() is not None for reference in alive])
        return following(batches)

    monkeypatch.setattr(TrainingBase, "load_text_encoders", load_text_encoders)
    monkeypatch.setattr(LatentBatches, "next", next_batch)
    result = tiny.train("sdxl", tiny.dataset(), steps=2)
    assert during == [[False, False]] * 2
    assert [path.name for path in result.files] == ["my_dog.safetensors"]
    assert all(name.startswith("lora_unet_") for name in tensors(result))


@pytest.mark.parametrize("previews", [False, True])
def test_the_autoencoder_has_left_before_training(previews, tiny, monkeypatch):
    moves, alive, during = [], [], []
    load, following = TrainingBase.load_vae, LatentBatches.next

    def load_vae(*arguments):
        vae = load(*arguments)
        move = vae.module.to
        vae.module.to = lambda *to, **more: moves.append(str(to[0])) or move(*to, **more)
        alive.append(weakref.ref(vae.module))
        return vae

    def next_batch(batches):
        during.append((alive[0]() is not None, tuple(moves)))
        return following(batches)

    monkeypatch.setattr(TrainingBase, "load_vae", load_vae)
    monkeypatch.setattr(LatentBatches, "next", next_batch)
    tiny.train(steps=2, preview_every=1 if previews else 0, preview_steps=1)
    # It waits off the device for previews, visits the device for each, and is gone where none are asked for.
    expected = [(True, ("cpu",)), (True, ("cpu", "cpu", "cpu"))] if previews else [(False, ())] * 2
    assert during == expected


def test_text_encoders_learn_a_lora_beside_the_tokens(tiny, inside, dog):
    result = tiny.train("sdxl", train_text_encoder=True, steps=2)
    # Attached in this order: two text encoders, the UNet.
    assert [len(lora) for lora in inside.lora][:2] == [3 * 4 * 2, 3 * 4 * 2]
    stored = tensors(result)
    for prefix, unused in (("lora_te1_", "_layers_2_"), ("lora_te2_", None), ("lora_unet_", None)):
        # SDXL reads its first encoder before the last layer, which therefore learns nothing.
        ups = [name for name in stored if name.startswith(prefix) and name.endswith("lora_up.weight")]
        assert ups and all(bool(stored[name].abs().max() > 0) is not bool(unused and unused in name) for name in ups)
    for encoder in inside.encoders:
        embedding = encoder.get_input_embeddings()
        start = embedding.weight[base_ids(tiny.base("sdxl"), "dog")]
        assert not torch.equal(embedding.learned, start)
        torch.testing.assert_close(embedding.learned.norm(dim=-1), start.norm(dim=-1))


def base_ids(base, word):
    return base.tokenizer()(word, add_special_tokens=False)["input_ids"]


def test_a_text_lora_trains_without_tokens(tiny, inside):
    result = tiny.train(dataset=tiny.dataset(), train_text_encoder=True, steps=2)
    assert [path.name for path in result.files] == ["my_dog.safetensors"]
    assert any(
        name.startswith("lora_te_") and "up" in name and v.abs().max() > 0 for name, v in tensors(result).items()
    )


def test_several_rows_and_tokens_each_keep_their_norm(tiny, inside):
    tokens = LearnedToken("<dog>", "dog", rows=3), LearnedToken("<odd>", "")
    captions = [f"a <dog> in <odd>, {number}" for number in range(4)]
    for norm in ("row", "authors"):
        dataset = tiny.dataset(*tokens, captions=captions, base_captions="a dog in something")
        result = tiny.train("sdxl", dataset, token_norm=norm, name=norm)
        assert [path.name for path in result.files] == [f"{norm}{end}.safetensors" for end in ("", "_dog", "_odd")]
        dog, odd = (load_file(path) for path in result.files[1:])
        assert {key: tuple(value.shape) for key, value in dog.items()} == {"clip_l": (3, 64), "clip_g": (3, 128)}
        for key, table in zip(("clip_l", "clip_g"), (e.get_input_embeddings().weight for e in inside.encoders)):
            word = table[base_ids(tiny.base("sdxl"), "dog")].norm()
            torch.testing.assert_close(dog[key].norm(dim=-1), word.expand(3))
            # A row of n draws of the table's deviation has a length near deviation times the root of n.
            length = odd[key].norm() / table.std()
            assert length == pytest.approx(1 if norm == "authors" else table.shape[1] ** 0.5, rel=0.25)
        inside.encoders.clear()


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, monkeypatch):
    from diffusers.models.attention import BasicTransformerBlock
    from transformers.models.clip.modeling_clip import CLIPMLP

    calls = {}
    for block in (BasicTransformerBlock, CLIPMLP):

        def forward(self, *arguments, _block=block, _forward=block.forward, **keywords):
            calls[_block] = calls.get(_block, 0) + 1
            return _forward(self, *arguments, **keywords)

        monkeypatch.setattr(block, "forward", forward)
    settings = {"train_text_encoder": True, "steps": 3}
    plain, plain_calls = tiny.train(**settings), dict(calls)
    calls.clear()
    saving = tiny.train(**settings, gradient_checkpointing=True, name="b")
    # Computed again in the backward pass of the policy, with its LoRA; the reference has no backward pass.
    assert all(calls[block] > plain_calls[block] for block in calls)
    assert saving.train.losses == plain.train.losses
    assert equal(plain, saving)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_bf16_trains_in_full_precision(family, tiny, inside):
    result = tiny.train(family, precision="bf16", train_text_encoder=True, preview_every=3, preview_steps=2)
    full = tiny.train(family, train_text_encoder=True, name="full")
    parameters = {n: p for n, p in inside.unet[0].named_parameters()}
    assert {p.dtype for n, p in parameters.items() if "lora" in n} == {torch.float32}
    assert {p.dtype for n, p in parameters.items() if "lora" not in n} == {torch.bfloat16}
    assert inside.encoders[0].get_input_embeddings().learned.dtype is torch.float32
    assert result.train.losses != full.train.losses
    assert result.train.losses == pytest.approx(full.train.losses, rel=0.3, abs=0.05)
    assert result.preview.size == (64, 64)


def test_the_lora_is_on_after_the_reference_pass(tiny, inside):
    tiny.train(steps=2)
    unet, batch = inside.unet[0], inside.batches[0]
    told = inside.text[0].policy(["a <dog>"], None)
    with torch.no_grad():
        trained = predict(unet, batch.latents[:1], batch.timesteps[:1], told)
        with lora_off(unet):
            without = predict(unet, batch.latents[:1], batch.timesteps[:1], told)
        with pytest.raises(RuntimeError, match="broken"), lora_off(unet):
            raise RuntimeError("broken")
        again = predict(unet, batch.latents[:1], batch.timesteps[:1], told)
        plain = predict(tiny.base().load_unet(), batch.latents[:1], batch.timesteps[:1], told)
    assert torch.equal(trained, again) and torch.equal(without, plain)
    assert not torch.equal(trained, without)


# Previews


def test_previews_do_not_change_the_course(tiny):
    progress = CancelAt()
    with_previews = tiny.train(steps=4, preview_every=2, preview_steps=2, name="a", progress=progress)
    without = tiny.train(steps=4, name="b")
    assert with_previews.train.losses == without.train.losses and equal(with_previews, without)
    assert progress.previews == [2, 4]
    folder = tiny.place("a").run_folder
    assert sorted(path.name for path in folder.glob("preview*")) == ["preview-000002.jpg", "preview-000004.jpg"]
    assert with_previews.preview.size == (64, 64) and without.preview is None


@pytest.mark.parametrize("tokens", [(), (LearnedToken("<dog>", "dog"),)])
def test_previews_take_any_prompt(tokens, tiny):
    dataset = tiny.dataset(*tokens)
    result = tiny.train(dataset=dataset, steps=1, preview_every=1, preview_steps=1, preview_prompt="a cat on the moon")
    assert len(result.preview.getcolors(64 * 64)) > 1


# Cancel and resume

RICH = {"steps": 5, "offset_noise": 0.1, "crop": "random", "flip": True, "train_text_encoder": True, "keep": "best"}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_cancel_and_resume_equal_one_run(family, tiny, class_pictures, dog):
    dataset = tiny.dataset(dog).with_class_folder(class_pictures, "a photo of a dog")
    whole = tiny.train(family, dataset, name="whole", **RICH)
    part = tiny.train(family, dataset, name="parts", progress=CancelAt("loss", step=2), **RICH)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    assert len(part.files) == 2 and all(path.exists() for path in part.files)
    rest = tiny.train(family, dataset, name="parts", resume=True, **RICH)
    assert (rest.train.steps, rest.train.stopped_by) == (5, "steps")
    assert rest.train.losses == whole.train.losses
    assert equal(rest, whole)
    logs = [tiny.place(name).run_folder.joinpath("log.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("message", ["encoding pictures", "encoding captions"])
def test_cancel_before_training_leaves_nothing(message, tiny, inside):
    progress = CancelAt(message)
    result = tiny.train(progress=progress)
    assert (result.train.stopped_by, result.train.steps, result.files) == ("cancelled", 0, ())
    assert inside.unet == [] and inside.batches == []
    assert [path for path in tiny.folder.rglob("*") if path.is_file()] == []
    if message == "encoding pictures":
        assert inside.encoded == 1  # heard before the next picture


def test_cancel_while_the_model_loads_leaves_no_files(tiny, monkeypatch):
    progress, load = CancelAt(), TrainingBase.load_unet

    def load_unet(*arguments):
        progress.flag = True
        return load(*arguments)

    monkeypatch.setattr(TrainingBase, "load_unet", load_unet)
    result = tiny.train(progress=progress)
    assert (result.train.stopped_by, result.train.steps, result.files) == ("cancelled", 0, ())
    assert newest_states(tiny.place().run_folder) == []


def test_cancel_during_a_preview_saves_and_resumes_exactly(tiny, monkeypatch):
    settings = {"steps": 4, "preview_every": 2, "preview_steps": 3}
    whole = tiny.train(name="whole", **settings)
    progress, euler, steps = CancelAt(), sampling.euler, []

    def cancelling(schedule):
        progress.flag = True
        scheduler = euler(schedule)
        step = scheduler.step
        scheduler.step = lambda *a, **k: steps.append(1) or step(*a, **k)
        return scheduler

    monkeypatch.setattr(sampling, "euler", cancelling)
    result = tiny.train(name="parts", progress=progress, **settings)
    assert (result.train.stopped_by, result.train.steps) == ("cancelled", 2)
    assert len(steps) == 1 and result.preview is None and progress.previews == []
    monkeypatch.setattr(sampling, "euler", euler)
    rest = tiny.train(name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)


def test_cancel_during_saving_still_saves_whole_files(tiny, monkeypatch):
    progress, save = CancelAt(), train.save_personalization

    def cancelling(*arguments, **keywords):
        progress.flag = True
        return save(*arguments, **keywords)

    monkeypatch.setattr(train, "save_personalization", cancelling)
    result = tiny.train(progress=progress)
    assert result.train.stopped_by == "steps"
    assert len(result.files) == 2 and all(read_header(path).shapes for path in result.files)


def test_nothing_of_a_run_stays_in_memory(tiny, monkeypatch):
    alive = []

    def watch(load):
        def watching(*arguments):
            loaded = load(*arguments)
            modules = loaded if isinstance(loaded, list) else [getattr(loaded, "module", loaded)]
            alive.extend(weakref.ref(module) for module in modules)
            return loaded

        return watching

    for name in LOADS:
        monkeypatch.setattr(TrainingBase, name, watch(getattr(TrainingBase, name)))
    result = tiny.train(preview_every=2, preview_steps=1, train_text_encoder=True, keep="best", checkpoint_every=2)
    tiny.train(name="b", progress=CancelAt("loss", step=1))
    gc.collect()
    assert len(alive) == 6 and [reference() for reference in alive] == [None] * 6
    assert result.preview is not None


# Errors


def test_out_of_memory_while_preparing_says_what_to_lower(tiny, monkeypatch):
    def load_unet(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB")

    monkeypatch.setattr(TrainingBase, "load_unet", load_unet)
    with pytest.raises(TrainingError, match="out of memory while loading .*lower the batch size"):
        tiny.train()


def test_a_loss_that_is_no_number_keeps_the_last_good_weights(tiny, monkeypatch):
    good = tiny.train(steps=2, name="good")
    steps, dco_step = [], train.dco_step

    def breaking(*arguments, **keywords):
        steps.append(1)
        return dco_step(*arguments, **keywords) * (math.nan if len(steps) == 3 else 1)

    monkeypatch.setattr(train, "dco_step", breaking)
    result = tiny.train(steps=9, name="bad")
    assert (result.train.stopped_by, result.train.steps) == ("nan", 2)
    assert equal(good, result)


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fail when a model is loaded."""

    def arm():
        for name in LOADS:
            monkeypatch.setattr(TrainingBase, name, lambda *arguments: pytest.fail("loaded a model"))

    return arm


def test_an_existing_name_is_refused_before_anything_is_loaded(tiny, loads_nothing):
    tiny.train(steps=1)
    before = files_below(tiny.folder)
    loads_nothing()
    with pytest.raises(ConfigError, match=r"my_dog.safetensors exists already in loras; choose another output name"):
        tiny.train(steps=1)
    tiny.place().lora_path.rename(tiny.folder / "elsewhere")
    with pytest.raises(ConfigError, match="my_dog.safetensors exists already in embeddings"):
        tiny.train(steps=1)
    # Resume continues a run; without a training state there is none, and the file is somebody's result.
    with pytest.raises(ConfigError, match="exists already in embeddings"):
        tiny.train(steps=1, resume=True)
    (tiny.folder / "elsewhere").rename(tiny.place().lora_path)
    assert files_below(tiny.folder).keys() == before.keys()


def test_permission_to_overwrite_is_used(tiny):
    tiny.train(steps=1)
    result = tiny.train(steps=2, overwrite=True)
    assert json.loads(read_header(result.files[0]).metadata["personalize.config"])["steps"] == 2


def test_a_resume_that_does_not_fit_is_refused_before_anything_is_loaded(tiny, loads_nothing, dog):
    tiny.train(steps=4, progress=CancelAt("loss", step=2))
    before = files_below(tiny.folder)
    loads_nothing()
    others = [
        {"learning_rate": 2e-3},
        {"dataset": tiny.dataset(dog, captions=[f"the <dog>, {n}" for n in range(4)])},
        {"family": "sd21"},
        {"seed": 1},
    ]
    for other in others:
        with pytest.raises(ConfigError, match="was made with other settings, pictures, base model or stopping rule"):
            tiny.train(**{"steps": 4, "resume": True} | other)
    state = newest_states(tiny.place().run_folder)[0]
    content = state.read_bytes()
    state.write_bytes(content[:1000])
    with pytest.raises(FormatError, match=f"training state {state.name} is damaged"):
        tiny.train(steps=4, resume=True)
    state.write_bytes(content)
    assert files_below(tiny.folder).keys() == before.keys()


def test_a_state_is_not_thrown_away_unasked(tiny, loads_nothing):
    result = tiny.train(steps=4, progress=CancelAt("loss", step=2))
    for path in result.files:
        path.unlink()
    before = files_below(tiny.folder)
    assert tiny.train(steps=1, name="other").train.steps == 1
    loads_nothing()
    with pytest.raises(ConfigError, match="there is a training state of my_dog from step 2; turn on resume to"):
        tiny.train(steps=4)
    assert before.items() <= files_below(tiny.folder).items()


def test_tokens_of_the_vocabulary_are_refused(tiny, monkeypatch):
    tokenizer = tiny.base().tokenizer()
    tokenizer.add_tokens(["<dog>"])
    monkeypatch.setattr(TrainingBase, "tokenizer", lambda self: tokenizer)
    with pytest.raises(ConfigError, match="token <dog> is already in the tokenizer's vocabulary; choose another name"):
        tiny.train()


def test_a_rank_that_is_not_the_writer_writes_nothing(tiny):
    class Second(Ranks):
        index, count = 1, 2

    progress = CancelAt()
    result = train.train(
        train.DCOConfig(steps=2, batch_size=1, resolution=64, rank=2, checkpoint_every=1, preview_every=1),
        tiny.base(),
        tiny.dataset(),
        tiny.place(),
        device=torch.device("cpu"),
        progress=progress,
        ranks=Second(),
    )
    assert (result.files, result.preview, result.train.steps, progress.messages) == ((), None, 2, [])
    assert not tiny.folder.joinpath("out").exists()
