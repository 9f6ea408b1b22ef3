"""Face encoders on the small world: people to learn from, what a training starts from, and pictures drawn with one.

The recipe is the one that users call. Only the identity loss is the small world's own, put in the place of the face
network, which has never seen such faces.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from captions import Detail, caption
from drawing import draw
from identity import FILE as IDENTITY_FILE
from identity import IdentityNet, identities, portrait
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import SIDE, Identity, Scene
from torch import Tensor
from weights import path_of

from comfyui_personalize.models.guidance import text_guidance
from comfyui_personalize.models.lookahead import (
    Resampler,
    guidance_weights,
    lookahead_guidance,
    predict_original,
    preview,
)
from comfyui_personalize.models.lora import kohya_tensors
from comfyui_personalize.trainers.adapters import ATTENTION, add_lora, lora_off, read_lora
from comfyui_personalize.trainers.base import TrainingBase, open_base
from comfyui_personalize.trainers.clip_vision import load_clip_vision
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.lookahead import train as recipe
from comfyui_personalize.trainers.lookahead.config import LookaheadConfig, LookaheadModels, PictureTerm
from comfyui_personalize.trainers.lookahead.data import CONCEPT, VANILLA, FaceData, FaceDataSettings, FaceSet
from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention
from comfyui_personalize.trainers.lookahead.losses import Seen
from comfyui_personalize.trainers.lookahead.starting import start_encoder
from comfyui_personalize.trainers.output import OutputPlace
from comfyui_personalize.trainers.sampling import euler, sample
from comfyui_personalize.trainers.text import PromptEncoder
from comfyui_personalize.trainers.vae import LATENT_CHANNELS, PIXELS_PER_LATENT

CPU = torch.device("cpu")
CLIP_VISION_SIZES = Path(__file__).resolve().parents[1] / "tiny" / "clip_vision.json"
CLASS_WORD = "person"
TOKENS, DIM = 4, 64
"""Of the resampler that a training starts from."""

# Chosen on other people than those that are reported. The published rates are for an adapter that knows faces already.
SETTINGS = {
    "batch_size": 4,
    "lookahead_batch_size": 4,
    "learning_rate": 1e-3,
    "adapter_learning_rate": 1e-3,
    "weight_decay": 0.0,
    "lora_rank": 8,
    "copy_rank": 8,
    "resolution": SIDE,
    "crop": "center",
    "precision": "fp32",
    "save_precision": "fp32",
    "gradient_checkpointing": False,
    "checkpoint_every": 0,
}
LOSS_WEIGHT = 0.1
"""Of the identity loss."""
TEXT_SCALE, FULL_SCALE, IDENTITY_SCALE = 0.0, 3.0, 0.0
"""Guidance scales of the pictures; together the small world's usual text scale, in one prediction."""
SAMPLING_STEPS = 20
LCM_LEVELS, LCM_BATCH, LCM_RANK = 20, 16, 16
"""Noise levels that the LCM LoRA is distilled on, and the pictures of each step."""


# People


def write_people(folder: Path, name: str, people: int, each: int) -> FaceData:
    """Draw people made up at random, as the authors' generation scripts leave them, and open them for the trainer.

    Args:
        each: pictures of a person; those in the plain style lie below ``vanilla`` and are what the encoder sees.
    """
    metadata = {}
    for number, who in enumerate(identities(f"faces/{name}", people)):
        rng = random.Random(f"faces/{name}/{number}")
        scenes = [portrait(rng, who) for _ in range(each)]
        scenes[0] = Scene(scenes[0].background, scenes[0].things)
        for index, scene in enumerate(scenes):
            words = bare_caption(scene).replace(CLASS_WORD, CONCEPT).replace(" ", "_")
            path = f"{number}/{VANILLA if scene.style == 'flat' else 'stylized'}/{words}_{index}.png"
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(draw(scene) * 255).astype(np.uint8)).save(folder / path)
            metadata[path] = number
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    people_set = FaceSet(
        folder=folder,
        metadata=folder / "metadata.json",
        prompt_in_filename=True,
        only_vanilla_references=True,
        only_target_prompts=True,
        placeholder=CLASS_WORD,
    )
    return FaceDataSettings(sets=(people_set,)).open()


def bare_caption(scene: Scene) -> str:
    """A caption that says all but what the person looks like, "a person on the left at night"."""
    return caption(scene, Detail(parts=False))


@dataclass(frozen=True)
class Sitting:
    """A picture to be drawn: who is to be in it, and what else it is to show."""

    who: Identity
    reference: Scene
    """What the encoder sees."""
    asked: Scene
    """Shows how a drawing of the person would look; its caption is the prompt."""


def sittings(people: Sequence[Identity], each: int, name: str = "reported") -> list[Sitting]:
    """So many pictures of each, all from one plain reference."""
    made = []
    for number, who in enumerate(people):
        rng = random.Random(f"faces/sittings/{name}/{number}")
        reference = portrait(rng, who)
        reference = Scene(reference.background, reference.things)
        made += [Sitting(who, reference, portrait(rng, who)) for _ in range(each)]
    return made


# What a training starts from


def write_start(folder: Path, checkpoint: Path, seed: int = 0) -> LookaheadModels:
    """An adapter that changes nothing yet, and an image encoder.

    Keys begin as the UNet's own and values at zero; so the adapter adds nothing, and learns.
    """
    unet = open_base(checkpoint).load_unet()
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    context = unet.get_submodule(names[0]).to_k.weight.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = {"inner_dim": 2 * DIM, "hidden_dim": 2 * DIM}
        resampler = Resampler(picture_dim=DIM, output_dim=context, dim=DIM, tokens=TOKENS, depth=2, **inner)
    start = {f"image_proj.{name}": value for name, value in resampler.state_dict().items()}
    for number, name in enumerate(names):
        keys = unet.get_submodule(name).to_k.weight
        start[f"ip_adapter.{2 * number + 1}.to_k_ip.weight"] = keys.detach().clone()
        start[f"ip_adapter.{2 * number + 1}.to_v_ip.weight"] = torch.zeros_like(keys)
    vision = folder / "image_encoder"
    vision.mkdir(parents=True)
    save_file(start, folder / "ip-adapter-plus.safetensors")
    towers = load_file(path_of("world_clip.safetensors"))
    image = {name: value for name, value in towers.items() if name.startswith(("vision_model.", "visual_projection."))}
    save_file(image, vision / "model.safetensors")
    shutil.copy(CLIP_VISION_SIZES, vision / "config.json")
    return LookaheadModels(start=folder / "ip-adapter-plus.safetensors", clip_vision=vision)


def write_lcm_lora(path: Path, checkpoint: Path, people: FaceData, *, steps: int, seed: int = 0) -> Path:
    """Distil a LoRA under which one step previews the picture (arXiv 2311.05556), and write it as kohya does.

    Each step leads the preview from one of LCM_LEVELS noise levels to that from the next lower one, which the model
    itself reaches with guidance; from the lowest the target is the model's own estimate.
    """
    base, generator = open_base(checkpoint), torch.Generator().manual_seed(seed)
    shown = people.sets[0].pictures
    schedule, vae = base.noise_schedule(), base.load_vae()
    latents = vae.encode_moments(torch.stack([_pixels(one.path) for one in shown]))[0]
    told = Prompts(base)
    unet = base.load_unet()
    trained = add_lora(unet, LCM_RANK, ATTENTION, generator)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
    gap = schedule.timesteps // LCM_LEVELS
    for _ in range(steps):
        chosen = torch.randint(len(shown), (LCM_BATCH,), generator=generator)
        prompts = [shown[index].prompt for index in chosen]
        text, empty = told(prompts), told([""] * len(prompts))
        noise = torch.randn(latents[chosen].shape, generator=generator)
        times = gap * torch.randint(1, LCM_LEVELS + 1, (LCM_BATCH,), generator=generator) - 1
        noisy = schedule.add_noise(latents[chosen], noise, times)
        with torch.no_grad(), lora_off(unet):
            both = predict(unet, torch.cat([noisy, noisy]), times.repeat(2), Conditioning.join(empty, text))
            estimate = text_guidance(*both.chunk(2), FULL_SCALE)
        original = predict_original(schedule, estimate, noisy, times)
        lower = (times - gap).clamp(min=0)
        nearer = schedule.add_noise(original, estimate, lower)
        with torch.no_grad():
            goal = preview(schedule, predict(unet, nearer, lower, text), nearer, lower)
        goal = torch.where((times < gap)[:, None, None, None], original, goal)
        found = preview(schedule, predict(unet, noisy, times, text), noisy, times)
        F.mse_loss(found, goal).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_file(kohya_tensors(read_lora(unet, "unet"), base.family.name, layers_per_block=base.layers_per_block), path)
    return path


class Prompts:
    """Prompts as a base model's UNet is told them."""

    def __init__(self, base: TrainingBase):
        self._encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
        self._known: dict[str, Conditioning] = {}

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        for prompt in {*prompts} - self._known.keys():
            with torch.no_grad():
                encoded = self._encoder.encode_frozen([prompt])
            sizes = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]])
            self._known[prompt] = Conditioning(encoded.embeds, encoded.pooled, sizes)
        return Conditioning.join(*(self._known[prompt] for prompt in prompts))


def _pixels(path: Path) -> Tensor:
    """A picture (3, height, width) in -1..1."""
    return torch.from_numpy(np.array(Image.open(path), np.float32)).permute(2, 0, 1) / 127.5 - 1


# Training


class IdentityLoss:
    """1 - cosine of the previewed person and the reference, by the small world's identity network."""

    def __init__(self):
        self.net = IdentityNet.load(path_of(IDENTITY_FILE))

    def __call__(self, seen: Seen) -> Tensor:
        return 1 - self.likeness(seen.pictures, seen.references).mean()

    def likeness(self, shown: Tensor, wanted: Tensor) -> Tensor:
        """Cosine for each pair of pictures, (batch,); both (batch, 3, 64, 64) in -1..1."""
        shown, wanted = (self.net.embed((pixels + 1) / 2) for pixels in (shown, wanted))
        return (shown * wanted).sum(1)


@dataclass(frozen=True)
class Taught:
    """An encoder and how its training went."""

    path: Path
    losses: tuple[float, ...]
    """Of every step; where the training looks ahead, those at odd places are of the picture."""


def teach(
    checkpoint: Path,
    models: LookaheadModels,
    people: FaceData,
    folder: Path,
    *,
    steps: int,
    ahead: bool,
    seed: int = 0,
    weight: float = LOSS_WEIGHT,
    **settings,
) -> Taught:
    """Train an encoder with the recipe.

    Args:
        steps: of the optimizer; where the training looks ahead, every second one does.
        weight: of the identity loss.
        settings: of LookaheadConfig, besides SETTINGS.
    """
    told = SETTINGS | {"steps": steps, "seed": seed, "lookahead_every": int(ahead)} | settings
    config = LookaheadConfig(**told, picture_losses=(PictureTerm(name="image_l1", weight=weight),))
    name = f"{'ahead' if ahead else 'denoising'}_{seed}"
    place = OutputPlace(name, folder / "encoders", folder / "embeddings", folder / "runs" / name, overwrite=True)
    losses = {"identity": (weight, IdentityLoss())}
    with mock.patch.object(recipe, "make_losses", lambda *_: losses):
        done = recipe.train(config, open_base(checkpoint), models, people, place, device=CPU)
    return Taught(done.files[0], tuple(done.train.losses))


# Drawing


class FacePainter:
    """Draws people with a base model and a face encoder."""

    def __init__(self, checkpoint: Path, models: LookaheadModels, encoder: Path | None = None):
        """Args: encoder: a trained one; without it the adapter file that a training starts from."""
        base = open_base(checkpoint)
        unet = base.load_unet().requires_grad_(False)
        draws = torch.Generator().manual_seed(0)
        read = start_encoder(encoder or models.start, unet, lora_rank=0, copy_rank=1, generator=draws)
        self._identity, self._resampler = IdentityAttention(unet, read), read.resampler.float()
        self._vision = load_clip_vision(models.clip_vision, torch.float32, CPU)
        self._unet, self._told = unet, Prompts(base)
        self._vae, self._schedule = base.load_vae(), base.noise_schedule()

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int], references: Tensor | None) -> Tensor:
        """One picture for each prompt, seed and reference, (n, 3, 64, 64) in -1..1.

        Args:
            references: pictures (n, 3, 64, 64) in -1..1; None draws with the base model alone.
        """
        text, empty = self._told(prompts), self._told([""] * len(prompts))
        cells = (1, LATENT_CHANNELS, SIDE // PIXELS_PER_LATENT, SIDE // PIXELS_PER_LATENT)
        noise = torch.cat([torch.randn(cells, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        person = nobody = latents = None
        if references is not None:
            hidden = self._vision.hidden_states(references)
            person = self._identity.adapter(self._resampler(hidden))
            nobody = self._identity.adapter(self._resampler(self._vision.nobody()).expand(len(references), -1, -1))
            latents = self._vae.encode_moments(references)[0]
        scheduler = euler(self._schedule)
        weights = guidance_weights(TEXT_SCALE, FULL_SCALE, IDENTITY_SCALE)

        def guided(x: Tensor, timestep: Tensor) -> Tensor:
            times = timestep.expand(len(x)).long()
            shared = None
            if latents is not None:
                noisy = self._schedule.add_noise(latents, noise, times)
                shared = self._identity.encode(noisy, times, text)
            rows = {
                "plain_uncond": self._identity.predict(x, times, empty, adapter=nobody),
                "shared_text": self._identity.predict(x, times, text, adapter=person, reference=shared),
            }
            return lookahead_guidance(rows, weights)

        *_, drawn = sample(scheduler, guided, noise, SAMPLING_STEPS)
        return self._vae.decode(drawn)

    def adapter_values(self) -> float:
        """Norm of the adapter's value weights relative to that of the prompt's, the mean over all blocks."""
        shares = [
            value.norm() / self._unet.get_submodule(f"{block}.attn2.to_v").weight.norm()
            for block, (_, value) in self._identity.encoder.adapter.items()
        ]
        return torch.stack(shares).mean().item()
