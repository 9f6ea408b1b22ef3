"""Custom Diffusion on tiny checkpoints: what trains, masks and captions of random sizes, files, exact resume, DVAR."""

import pytest
import torch
from safetensors.torch import load_file

from comfyui_personalize.models.custom_diffusion import is_trained, read_custom_diffusion
from comfyui_personalize.models.dvar import EvaluationSettings
from comfyui_personalize.models.dvar.rescaling import PREFIXES
from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.dvar import custom_diffusion
from comfyui_personalize.trainers.dvar.config import CustomDiffusionConfig
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.stopping import DVAR

DOG = LearnedToken("<dog>", "dog")


@pytest.fixture
def run(tiny):
    def train(*arguments, **keywords):
        return tiny.train(custom_diffusion, CustomDiffusionConfig, *arguments, **{"rescale_variants": 2} | keywords)

    return train


@pytest.fixture
def unets(monkeypatch):
    """The UNets of trainings with copies of their weights as they came."""
    seen, load = [], TrainingBase.load_unet

    def load_unet(*arguments):
        unet = load(*arguments)
        seen.append((unet, {name: value.clone() for name, value in unet.state_dict().items()}))
        return unet

    monkeypatch.setattr(TrainingBase, "load_unet", load_unet)
    return seen


class CancelAt(SilentProgress):
    def __init__(self, step):
        self.step, self.flag = step, False

    def report(self, step, total, message="", preview=None):
        self.flag = self.flag or (step == self.step and message.startswith("loss"))

    def cancelled(self):
        return self.flag


def tensors(result):
    return {(path.parent.name, key): value for path in result.files for key, value in load_file(path).items()}


def equal(first, second):
    first, second = tensors(first), tensors(second)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_only_keys_values_and_the_word_train(family, run, tiny, unets):
    dataset = tiny.dataset(DOG, class_caption="a photo of a dog")
    result = run(family, dataset, save_precision="fp32", save_authors_file=True)
    unet, before = unets[0]
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if is_trained(name)} != set()
    assert [path.name for path in result.files] == ["my_dog.safetensors", "my_dog.bin", "my_dog.safetensors"]
    ours, authors = (read_custom_diffusion(path) for path in result.files[:2])
    assert ours.weights.keys() == authors.weights.keys() == changed
    assert all(torch.equal(ours.weights[name], unet.state_dict()[name]) for name in changed)
    assert [token.trigger for token in ours.tokens] == [token.trigger for token in authors.tokens] == ["<dog>"]
    assert torch.equal(ours.tokens[0].rows["clip_l"], authors.tokens[0].rows["any"])


def test_bf16_trains_in_full_precision(run, unets):
    run(precision="bf16", preview_every=3, preview_steps=1)
    dtypes = {is_trained(name): parameter.dtype for name, parameter in unets[0][0].named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_random_sizes_have_their_masks_and_captions(run, tiny, monkeypatch):
    batches, following = [], LatentBatches.next
    monkeypatch.setattr(LatentBatches, "next", lambda self: batches.append(following(self)) or batches[-1])
    run(dataset=tiny.dataset(DOG, class_caption="a dog"), rescale_variants=12, steps=12)
    small = [
        mask for batch in batches for mask, prefix in zip(batch.masks, batch.prefixes) if prefix in PREFIXES["small"]
    ]
    assert small and all(0 < mask.sum() < mask.numel() for mask in small)
    assert {prefix for batch in batches for prefix in batch.prefixes} <= {"", *PREFIXES["small"], *PREFIXES["zoomed"]}
    assert all(prefix == "" for batch in batches for prefix in batch.prefixes[2:])  # of the class


def test_the_loss_falls_on_a_fixed_batch_and_dvar_stops(run):
    evaluation = EvaluationSettings(batch_size=3, mean_latent=True)
    settings = {"rescale_variants": 0, "learning_rate": 1e-3}
    rule = DVAR(window=100, every=1, evaluation=evaluation)
    losses = run(steps=20, name="a", stopping=rule, **settings).train.evaluations
    assert losses[-1][1] < losses[0][1]
    rule = DVAR(window=3, eps=1.0, every=1, evaluation=evaluation)
    stopped = run(steps=40, name="b", stopping=rule, **settings).train
    assert stopped.stopped_by == "rule" and stopped.steps < 40


def test_cancel_and_resume_equal_one_run(run, tiny):
    settings = {"steps": 4, "dataset": tiny.dataset(DOG, class_caption="a dog")}
    whole = run(name="whole", **settings)
    part = run(name="parts", progress=CancelAt(2), **settings)
    assert (part.train.stopped_by, part.train.steps) == ("cancelled", 2)
    rest = run(name="parts", resume=True, **settings)
    assert rest.train.losses == whole.train.losses and equal(rest, whole)


def test_what_it_cannot_do_is_refused_before_training(run, tiny):
    with pytest.raises(ConfigError, match="masked loss has no weights of timesteps; set snr_gamma to 0"):
        run(snr_gamma=5.0)
    taken = tiny.place().lora_path.with_suffix(".bin")
    taken.parent.mkdir(parents=True)
    taken.write_bytes(b"other")
    for resume in (False, True):  # there is nothing to resume, so that the file is not this run's own
        with pytest.raises(ConfigError, match="my_dog.bin exists already"):
            run(save_authors_file=True, resume=resume)
    assert taken.read_bytes() == b"other" and not tiny.place().lora_path.exists()


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_values_that_half_precision_cannot_hold_are_saved_in_full(share, run):
    result = run(steps=1, learning_rate=1e9, rescale_variants=0, kept_share=share, save_authors_file=True)
    for found in (read_custom_diffusion(path) for path in result.files[:2]):
        largest = [found.weight(name, torch.zeros(1)).abs().max() for name in found.names]
        assert max(largest) > torch.finfo(torch.float16).max


def test_all_of_cross_attention_trains(run, unets):
    result = run(trained="cross_attention", save_precision="fp32")
    unet, before = unets[0]
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if is_trained(name, "cross_attention")}
    assert {name.split("attn2.")[1] for name in changed} == {
        "to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"
    }  # fmt: skip
    found = read_custom_diffusion(result.files[0])
    assert all(torch.equal(found.weights[name], unet.state_dict()[name]) for name in changed)


def test_a_compressed_file_holds_most_of_the_change(run, unets):
    sizes = {}
    for share in (0.6, 0.999):
        result = run(name=str(share), kept_share=share, save_precision="fp32", save_authors_file=True)
        unet, before = unets[-1]
        for found in (read_custom_diffusion(path) for path in result.files[:2]):
            assert found.names == {name for name in before if is_trained(name)} and not found.weights
            error = sum(
                (found.weight(name, before[name]) - unet.state_dict()[name]).square().sum() for name in found.names
            )
            change = sum((unet.state_dict()[name] - before[name]).square().sum() for name in found.names)
            # By the squares of the values, what is left out is less than its share.
            assert 0 < error < (1 - share) * change
        sizes[share] = result.files[0].stat().st_size
    assert sizes[0.6] < sizes[0.999]
