"""A Perfusion training step as we do it, against the authors' order of work on the same weights, and files' sizes.

The authors' step (ChenDarYen/Key-Locked-Rank-One-Editing-for-Text-to-Image-Personalization, perfusion/perfusion.py and
roe.py) encodes the pictures anew, and each projection finds C⁻¹ i* for itself and keeps an output for each of the 77
positions. Written here from that description, on the same diffusers classes.
"""

from pathlib import Path

import torch
from dco_step import SCENES, Counter
from torch import Tensor, nn
from torch.nn import functional as F

from comfyui_personalize.models.families import FAMILIES
from comfyui_personalize.models.learned_embeddings import LearnedEmbedding
from comfyui_personalize.models.perfusion import (
    KEY,
    VALUE,
    Concept,
    ConceptParts,
    Covariance,
    concept_encoding,
    resize_mask,
    soft_mask,
    write_concept,
)
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.cache import LatentCache
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.optimizer import ParameterGroup, make_optimizer
from comfyui_personalize.trainers.order import BatchOrder
from comfyui_personalize.trainers.perfusion.concept import TrainedConcept
from comfyui_personalize.trainers.perfusion.config import PerfusionConfig
from comfyui_personalize.trainers.perfusion.prompts import PromptDraws
from comfyui_personalize.trainers.perfusion.step import perfusion_step
from comfyui_personalize.trainers.perfusion.text import ConceptText
from comfyui_personalize.trainers.rank_one_edits import cross_projections
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.text import LENGTH

TOKEN = LearnedToken("<dog>", "dog")


def settings(side: int) -> PerfusionConfig:
    """The authors' settings for one micro-batch; pictures stay unflipped, so that both see the same ones."""
    return PerfusionConfig(resolution=side, precision="fp32", prompts="captions", gradient_accumulation=1, flip=False)


def dataset(side: int) -> Dataset:
    """Five noise pictures with captions and masks."""
    generator = torch.Generator().manual_seed(0)
    images, masks = ([torch.rand(side, side, *last, generator=generator) for _ in SCENES] for last in ((3,), ()))
    captions = [f"a photo of a {TOKEN.trigger} {scene}" for scene in SCENES]
    return Dataset.from_tensors(images, captions, tokens=[TOKEN], masks=masks)


def random_covariance(width: int) -> Covariance:
    """C⁻¹ of random encodings."""
    rows = torch.randn(4 * width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Covariance(torch.linalg.inv(rows.T @ rows / len(rows)))


class _Step:
    """What both ways share: models, batches and prompts."""

    def __init__(self, checkpoint: Path, side: int) -> None:
        base, self.config = open_base(checkpoint), settings(side)
        self.vae = base.load_vae()
        self.data, self.schedule = dataset(side), base.noise_schedule()
        latents = LatentCache.build(self.data.examples, self.vae, size=side, shrink_mask=_shrink_mask)
        generator, order = torch.Generator().manual_seed(0), BatchOrder(len(self.data.examples))
        self.batches = LatentBatches(self.config, order, generator, latents, None, self.schedule.timesteps, Ranks())
        self.prompts = PromptDraws(self.data, TOKEN, None, generator, self.config.batch_size, Ranks())
        encoders = base.load_text_encoders()
        self.text = ConceptText(base.family, encoders, base.tokenizer(), TOKEN)
        self.unet = base.load_unet().requires_grad_(False).train()
        self.sized = base.family.size_conditioning
        self.covariance = random_covariance(self.unet.config.cross_attention_dim)
        first = self.prompts.all[: self.config.batch_size]
        self.start = self.text.encode_frozen([one.superclass for one in first]).embeds, self.text.superclass_rows(first)
        self.counter = Counter()
        self.unet.register_forward_pre_hook(self.counter.unet, with_kwargs=True)
        self.vae.module.encoder.register_forward_pre_hook(self.counter.vae)
        for encoder in encoders:
            encoder.register_forward_pre_hook(self.counter.text, with_kwargs=True)

    def told(self, batch, shown) -> Conditioning:
        embeds = self.text.encode(shown)
        return Conditioning(embeds.embeds, embeds.pooled, batch.time_ids if self.sized else None)


class Ours(_Step):
    """The trainer's own parts, put together as trainers/perfusion/train.py does."""

    def __init__(self, checkpoint: Path, side: int) -> None:
        super().__init__(checkpoint, side)
        self.concept = TrainedConcept(self.config, self.unet, self.covariance, *self.start)
        words = ParameterGroup("embedding", self.text.learned, self.config.embedding_learning_rate, 0.01)
        self.optimizer = make_optimizer(self.config, [words, *self.concept.groups], Ranks())

    def step(self) -> float:
        batch = self.batches.next()
        shown = self.prompts.next(batch.draws)
        told = self.told(batch, shown)
        self.concept.follow(told.embeds, self.text.rows(shown))
        given = {"latents": batch.latents, "noise": batch.noise, "timesteps": batch.timesteps, "masks": batch.masks}
        loss = perfusion_step(self.unet, self.schedule, conditioning=told, **given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class _AuthorsProjection(nn.Module):
    """A linear layer that finds C⁻¹ i* anew in every call and answers differently at each position."""

    def __init__(self, weight: Tensor, encodings: Tensor, shared: dict) -> None:
        super().__init__()
        self.weight, self.shared = weight, shared
        self.output = nn.Parameter((encodings @ weight.T).mean(dim=0))

    def forward(self, x: Tensor) -> Tensor:
        target, inverse = self.shared["target_input"], self.shared["inverse"]
        dual = inverse @ target
        energy = dual @ target
        similarity = (x @ dual)[..., None]
        gate = torch.sigmoid((similarity / energy - 0.75) / 0.1)
        return F.linear(x - similarity * target / energy, self.weight) + gate * self.output


class Authors(_Step):
    """The authors' order of work."""

    def __init__(self, checkpoint: Path, side: int) -> None:
        super().__init__(checkpoint, side)
        encodings, rows = self.start
        self.pixels = [example.load(side).pixels for example in self.data.examples]
        self.shared = {
            "target_input": concept_encoding(encodings, rows),
            "inverse": self.covariance.inverse.float(),
        }
        values = []
        for name, module in cross_projections(self.unet).items():
            edited = _AuthorsProjection(module.weight, encodings, self.shared)
            edited.output.requires_grad_(name.endswith(VALUE))
            self.unet.set_submodule(name, edited)
            values += [edited.output] if name.endswith(VALUE) else []
        words = {"params": [*self.text.learned.values()], "lr": self.config.embedding_learning_rate}
        self.optimizer = torch.optim.AdamW([words, {"params": values}], lr=self.config.learning_rate)

    def step(self) -> float:
        batch = self.batches.next()
        shown = self.prompts.next(batch.draws)
        with torch.no_grad():
            mean, std = self.vae.encode_moments(torch.stack([self.pixels[draw.example] for draw in batch.draws]))
            latents = mean + std * torch.randn_like(mean)
        told = self.told(batch, shown)
        seen = concept_encoding(told.embeds, self.text.rows(shown))
        self.shared["target_input"] = self.shared["target_input"] * 0.99 + seen * 0.01
        noisy = self.schedule.add_noise(latents, batch.noise, batch.timesteps)
        target = self.schedule.target(latents, batch.noise, batch.timesteps)
        prediction = predict(self.unet, noisy, batch.timesteps, told)
        loss = F.mse_loss(prediction * batch.masks, target * batch.masks)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _shrink_mask(mask: Tensor, size: tuple[int, int], name: str) -> Tensor:
    return resize_mask(soft_mask(mask, name).unsqueeze(0), size)[0]


# Files


def full_size_files(tiny, sizes, folder: Path) -> dict[str, dict[str, int]]:
    """Family -> bytes of a concept of the published UNet's size by mode, and what the authors store for the same.

    Args:
        tiny, sizes: the tests' modules of tiny checkpoints and of published shapes.
    """
    import pytest

    found: dict[str, dict[str, int]] = {}
    for family in FAMILIES:
        with pytest.MonkeyPatch.context() as patch:
            hollow = sizes.write_hollow(folder / "hollow.safetensors", sizes.published_shapes(tiny, patch, family))
        base = open_base(hollow)
        outputs = {name: len(module.weight) for name, module in cross_projections(base.unet.build()).items()}
        width = base.unet.config["cross_attention_dim"]
        encoders = [component.build().get_input_embeddings() for component in base.text_encoders]  # without values
        rows = {slot.key: torch.randn(1, it.weight.shape[1]) for slot, it in zip(base.family.encoders, encoders)}
        word = sum(map(Tensor.numel, rows.values()))
        found[family] = {
            "paper": _bytes(folder, family, outputs, width, rows, 1, torch.float16),
            "paper, fp32": _bytes(folder, family, outputs, width, rows, 1, torch.float32),
            "positions": _bytes(folder, family, outputs, width, rows, LENGTH, torch.float16),
            "authors": 4 * (LENGTH * sum(outputs.values()) + width * (width + 1) + word),
        }
        hollow.unlink()
    return found


def _bytes(folder: Path, family: str, outputs: dict[str, int], width: int, rows: dict, positions: int, dtype) -> int:
    vector = torch.randn(width)
    values = {name: torch.randn(positions, out) for name, out in outputs.items() if not name.endswith(KEY)}
    parts = ConceptParts(vector, vector, values, torch.randn(positions, width))
    word = LearnedEmbedding(TOKEN.trigger, rows)
    concept = Concept(word, TOKEN.initializer, parts, "0" * 16, family, "dog.safetensors", {})
    path = folder / "dog.safetensors"
    write_concept(path, concept, config=settings(512).as_dict(), dtype=dtype, overwrite=True)
    return path.stat().st_size
