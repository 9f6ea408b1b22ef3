"""A DCO training step as we do it, against the authors' order of work on the same weights.

The authors' step (kyungmnlee/dco, customize.py) encodes the pictures and every prompt anew, runs the reference
pass with the LoRA at scale zero instead of off, and trains whole embedding tables of which it restores all rows but
the new ones. Written here from that description, on the same diffusers and peft classes.
"""

import json
import threading
from pathlib import Path

import psutil
import torch
from torch.nn import functional as F

from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.adapters import ATTENTION, add_lora
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.batches import LatentBatches
from comfyui_personalize.trainers.cache import LatentCache
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.dataset import Dataset
from comfyui_personalize.trainers.dco.config import DCOConfig
from comfyui_personalize.trainers.dco.step import dco_step
from comfyui_personalize.trainers.dco.train import text_settings
from comfyui_personalize.trainers.devices import autocast, dtype_of
from comfyui_personalize.trainers.optimizer import ParameterGroup, clip_gradients, make_optimizer
from comfyui_personalize.trainers.order import BatchOrder
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.text_side import TextSide

SCENES = ("on the beach", "in front of trees", "on a street", "next to a red wall", "in the snow")


def dataset(side: int, tokens: bool) -> Dataset:
    """Five noise pictures with comprehensive captions."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(side, side, 3, generator=generator) for _ in SCENES]
    word = "<dog>" if tokens else "dog"
    captions = [f"a photo of a {word} {scene}, macro style" for scene in SCENES]
    return Dataset.from_tensors(images, captions, tokens=[LearnedToken("<dog>", "dog")] if tokens else [])


class Counter:
    """How often the parts of a base model run: rows of the UNet, pictures of the VAE, prompts of each text encoder."""

    def __init__(self) -> None:
        self.counts = {"unet_rows": 0, "unet_calls": 0, "vae_pictures": 0, "text_passes": 0}

    def unet(self, _module, arguments, _keywords) -> None:
        self.counts["unet_rows"] += len(arguments[0])
        self.counts["unet_calls"] += 1

    def text(self, _module, arguments, keywords) -> None:
        self.counts["text_passes"] += len(arguments[0] if arguments else keywords["input_ids"])

    def vae(self, _module, arguments) -> None:
        self.counts["vae_pictures"] += len(arguments[0])


class Ours:
    """The trainer's own parts, put together as trainers/dco/train.py does."""

    def __init__(self, base, data: Dataset, config: DCOConfig, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device
        generator = torch.Generator().manual_seed(0)
        dtype = dtype_of(config.precision, device)
        vae = base.load_vae(torch.float32, device)
        latents = LatentCache.build(data.examples, vae, size=config.resolution)
        captions, frozen = ([getattr(e, name) for e in data.examples] for name in ("caption", "base_caption"))
        tokens, told = data.tokens, {"captions": captions, "frozen": frozen, "device": device, "generator": generator}
        self.text = TextSide(text_settings(config), base, tokens, base.tokenizer(), **told)
        self.unet = base.load_unet(dtype, device).requires_grad_(False)
        lora = add_lora(self.unet, config.rank, ATTENTION, generator)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.sized, self.schedule = base.family.size_conditioning, base.noise_schedule()
        groups = [ParameterGroup("unet", lora, config.learning_rate, config.weight_decay), *self.text.groups]
        self.trained = [parameter for group in groups for parameter in group.parameters.values()]
        self.optimizer = make_optimizer(config, groups, Ranks())
        order = BatchOrder(len(data.examples))
        self.batches = LatentBatches(config, order, generator, latents, None, self.schedule.timesteps, Ranks())
        self.counter = Counter()
        self.unet.register_forward_pre_hook(self.counter.unet, with_kwargs=True)
        encoder = self.text._encoder
        for module in encoder.encoders if encoder else ():
            module.register_forward_pre_hook(self.counter.text, with_kwargs=True)

    def step(self) -> float:
        batch = self.batches.next()
        instances = [self.data.examples[draw.example] for draw in batch.draws]
        time_ids = batch.time_ids.to(self.device) if self.sized else None
        with autocast(self.config.precision, self.device):
            policy = self.text.policy([example.caption for example in instances], time_ids)
        loss = dco_step(
            self.unet,
            self.schedule,
            self.config,
            latents=batch.latents.to(self.device),
            noise=batch.noise.to(self.device),
            timesteps=batch.timesteps,
            policy=policy,
            reference=self.text.reference([example.base_caption for example in instances], time_ids),
            autocast=autocast(self.config.precision, self.device),
        )
        loss.backward()
        clip_gradients([*self.trained, *self.text.clip_also], self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for tensor in self.text.clip_also:
            tensor.grad = None
        self.text.retract()
        return float(loss.detach())


class Authors:
    """The authors' order of work."""

    def __init__(self, base, data: Dataset, config: DCOConfig, device: torch.device) -> None:
        self.config, self.data, self.device, self.base = config, data, device, base
        self.generator = torch.Generator().manual_seed(0)
        dtype = dtype_of(config.precision, device)
        self.vae = base.load_vae(torch.float32, device)
        self.pixels = [example.load(config.resolution).pixels for example in data.examples]
        self.tokenizer = base.tokenizer()
        self.encoders = base.load_text_encoders(dtype, device)
        self.tables, self.originals, self.norms = [], [], []
        self.tokenizer.add_tokens([token.trigger for token in data.tokens])
        for encoder in self.encoders if data.tokens else ():
            encoder.resize_token_embeddings(len(self.tokenizer), mean_resizing=False)
            table = encoder.get_input_embeddings().weight
            with torch.no_grad():
                table[-1] = table[self.tokenizer("dog", add_special_tokens=False)["input_ids"][0]]
            # Whole tables are trained in fp32, as their code means to.
            encoder.get_input_embeddings().float()
            table = encoder.get_input_embeddings().weight.requires_grad_(True)
            self.tables.append(table)
            self.originals.append(table.detach().clone())
            self.norms.append(table.detach()[-1:].norm(dim=-1, keepdim=True))
        self.unet = base.load_unet(dtype, device).requires_grad_(False)
        lora = add_lora(self.unet, config.rank, ATTENTION, self.generator)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        self.adapted = [module for module in self.unet.modules() if hasattr(module, "lora_A")]
        self.schedule = base.noise_schedule()
        self.trained = [*lora.values(), *self.tables]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": list(lora.values()), "lr": config.learning_rate},
                *({"params": [table], "lr": config.text_learning_rate} for table in self.tables),
            ],
            weight_decay=config.weight_decay,
        )
        self.place = 0
        self.counter = Counter()
        self.unet.register_forward_pre_hook(self.counter.unet, with_kwargs=True)
        self.vae.module.encoder.register_forward_pre_hook(self.counter.vae)
        for encoder in self.encoders:
            encoder.register_forward_pre_hook(self.counter.text, with_kwargs=True)

    def encode(self, prompts: list[str]) -> Conditioning:
        ids = self.tokenizer(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        hidden, pooled = [], None
        for encoder in self.encoders:
            output = encoder(input_ids=ids["input_ids"].to(self.device), output_hidden_states=True)
            hidden.append(output.hidden_states[-2])
            pooled = output.text_embeds if hasattr(output, "text_embeds") else None
        side = self.config.resolution
        time_ids = torch.tensor([[side, side, 0, 0, side, side]] * len(prompts), device=self.device)
        sized = self.base.family.size_conditioning
        return Conditioning(torch.cat(hidden, dim=-1), pooled if sized else None, time_ids if sized else None)

    def step(self) -> float:
        config = self.config
        chosen = [(self.place + offset) % len(self.pixels) for offset in range(config.batch_size)]
        self.place += config.batch_size
        examples = [self.data.examples[index] for index in chosen]
        with autocast(config.precision, self.device):
            with torch.no_grad():
                base = self.encode([example.base_caption for example in examples])
                mean, std = self.vae.encode_moments(torch.stack([self.pixels[index] for index in chosen]))
            latents = mean + std * torch.randn(mean.shape, generator=self.generator).to(mean)
            noise = torch.randn(mean.shape, generator=self.generator).to(mean)
            times = torch.randint(0, 1000, (len(chosen),), generator=self.generator).to(self.device)
            noisy = self.schedule.add_noise(latents, noise, times)
            target = self.schedule.target(latents, noise, times)
            if self.data.tokens:
                policy = self.encode([example.caption for example in examples])
            else:
                policy = base
            prediction = predict(self.unet, noisy, times, policy)
            with torch.no_grad():
                if self.data.tokens:
                    base = self.encode([example.base_caption for example in examples])
                for module in self.adapted:
                    module.scaling["default"] = 0.0
                reference = predict(self.unet, noisy, times, base)
                for module in self.adapted:
                    module.scaling["default"] = 1.0
        gain = F.mse_loss(prediction.float(), target.float()) - F.mse_loss(reference.float(), target.float())
        loss = -F.logsigmoid(-config.beta * gain)
        loss.backward()
        clip_gradients(self.trained, config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for table, original, norm in zip(self.tables, self.originals, self.norms, strict=True):
                table[:-1] = original[:-1]
                table[-1:] = F.normalize(table[-1:], dim=-1) * norm
        return float(loss.detach())


def settings(side: int, device: torch.device, full: bool) -> DCOConfig:
    """The authors' settings; in fp32 on the CPU, in bf16 with gradient checkpointing at full size."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    return DCOConfig(resolution=side, rank=32 if full else 4, precision=precision, gradient_checkpointing=full)


class PeakMemory:
    """Largest growth of this process's resident memory while open, sampled every few milliseconds, in bytes."""

    def __enter__(self) -> "PeakMemory":
        self._process, self._done = psutil.Process(), threading.Event()
        self._start, self.bytes = self._process.memory_info().rss, 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.003):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._start)

    def __exit__(self, *_reason) -> None:
        self._done.set()
        self._thread.join()


def measure_memory(which: str, checkpoint: str, side: int, device_name: str, tokens: bool, full: bool) -> None:
    """Print the peak memory in MiB of a few steps, models and optimizer included.

    For a process of its own: memory that another job has freed would be used again unseen.
    """
    device = torch.device(device_name)
    base = open_base(Path(checkpoint))
    base.tokenizer()
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel  # noqa: F401
    from peft import LoraConfig  # noqa: F401

    with PeakMemory() as peak:
        job = (Ours if which == "ours" else Authors)(base, dataset(side, tokens), settings(side, device, full), device)
        for _ in range(3):
            job.step()
    used = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak.bytes
    print(json.dumps({"peak_mib": used / 2**20}))
