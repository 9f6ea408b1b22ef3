"""One UNet as encoder, denoiser and preview: each pass sees its own, in the backward pass too, and nothing stays."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointError

from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
from comfyui_personalize.models.lookahead.encoder import encoder_tensors
from comfyui_personalize.models.lora import LowRankDelta
from comfyui_personalize.trainers.adapters import set_lora
from comfyui_personalize.trainers.base import open_base
from comfyui_personalize.trainers.conditioning import Conditioning, predict
from comfyui_personalize.trainers.lookahead.identity_attention import ENCODER, IdentityAttention, drop_tokens

BLOCK = "up_blocks.0.attentions.0.transformer_blocks.0"
PREVIEWED = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.attentions.0.proj_in",
    "mid_block.resnets.0.time_emb_proj",
    f"{BLOCK}.attn1.to_k",
    f"{BLOCK}.ff.net.2",
    "up_blocks.2.resnets.0.conv2",
)


def draws(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unet(tiny_checkpoint):
    return open_base(tiny_checkpoint("sdxl")).load_unet().float().eval().requires_grad_(False)


@pytest.fixture
def encoder(load_helper):
    return load_helper("tiny/lookahead.py").make_encoder("sdxl")


@pytest.fixture
def preview(unet):
    """A LoRA of linear and convolution layers, one of which the encoder's LoRA has too."""
    deltas = {}
    for seed, name in enumerate(PREVIEWED):
        outputs, *inputs = unet.get_submodule(name).weight.shape
        up = 0.05 * draws(outputs, 2, *[1] * (len(inputs) - 1), seed=seed)
        deltas[name] = LowRankDelta(draws(2, *inputs, seed=seed), up)
    return deltas


class Inputs:
    """Noisy latents of two rows and all that a pass is told."""

    def __init__(self, unet, tokens: int, dtype=torch.float32):
        config = unet.config
        self.noisy, self.reference = draws(2, 4, 8, 8, seed=1).to(dtype), draws(2, 4, 8, 12, seed=2).to(dtype)
        self.timesteps = torch.tensor([700, 300])
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        self.conditioning = Conditioning(
            draws(2, 5, config.cross_attention_dim, seed=3).to(dtype),
            draws(2, pooled, seed=4).to(dtype),
            torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2).to(dtype),
        )
        self.told = self.noisy, self.timesteps, self.conditioning
        self.told_of_reference = self.reference, self.timesteps, self.conditioning
        self.tokens = draws(2, tokens, config.cross_attention_dim, seed=5)


@pytest.fixture
def inputs(unet):
    return Inputs(unet, 4)


def shape_of(unet):
    """All that attaching could change: modules, their order, processors, weights, and what has gradients."""
    modules = [(name, id(module)) for name, module in unet.named_modules()]
    processors = [(name, id(processor)) for name, processor in unet.attn_processors.items()]
    weights = [(name, value.data_ptr(), value.requires_grad) for name, value in unet.named_parameters()]
    return modules, processors, weights, getattr(unet, "peft_config", None), unet.is_gradient_checkpointing


@torch.no_grad()
def test_without_identity_the_prediction_is_the_unets_own_bit_for_bit(unet, encoder, preview, inputs):
    plain = predict(unet, *inputs.told)
    identity = IdentityAttention(unet, encoder, preview=preview)
    adapter, reference = identity.adapter(inputs.tokens), identity.encode(*inputs.told_of_reference)
    nothing = drop_tokens(reference, {block: torch.zeros(1, k.shape[1]) for block, (k, _) in reference.items()})

    for got in (
        predict(unet, *inputs.told),
        identity.predict(*inputs.told),
        identity.predict(*inputs.told, adapter=adapter, adapter_scale=0.0),
        identity.predict(*inputs.told, reference=nothing),
    ):
        assert torch.equal(got, plain)
    for told in ({"adapter": adapter}, {"reference": reference}, {"preview": 0.5}):
        assert (identity.predict(*inputs.told, **told) - plain).abs().max() > 1e-3


@torch.no_grad()
def test_keys_are_made_by_attn1_without_the_encoders_lora_and_with_the_copys(unet, encoder, inputs):
    attn = unet.get_submodule(f"{BLOCK}.attn1")
    weight = attn.to_k.weight.clone()
    seen = []
    unet.get_submodule(f"{BLOCK}.norm1").register_forward_hook(lambda module, given, out: seen.append(out))
    identity = IdentityAttention(unet, encoder)
    attn.to_k.register_forward_hook(lambda module, given, out: seen.append(out))
    keys, _ = identity.encode(*inputs.told_of_reference)[BLOCK]

    normalised, under_lora = seen
    copy, _ = encoder.copies[BLOCK]
    torch.testing.assert_close(keys, normalised @ weight.T + copy.scale * normalised @ copy.down.T @ copy.up.T)
    assert (under_lora - F.linear(normalised, weight)).abs().max() > 1e-3
    assert (under_lora - keys).abs().max() > 1e-3


@torch.no_grad()
def test_the_encoder_pass_ends_behind_the_last_block_it_reads(unet, encoder, inputs):
    identity = IdentityAttention(unet, encoder)
    calls = []
    for level, block in enumerate(unet.up_blocks):
        block.register_forward_hook(lambda module, given, out, level=level: calls.append(level))
    last = max(int(block.split(".")[1]) for block in encoder.copies if block.startswith("up_blocks."))
    assert last + 1 < len(unet.up_blocks)
    assert identity.encode(*inputs.told_of_reference).keys() == encoder.copies.keys()
    assert calls == list(range(last + 1))
    calls.clear()
    identity.predict(*inputs.told)
    assert calls == list(range(len(unet.up_blocks)))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_detaching_restores_the_unet(unet, encoder, preview, inputs, checkpointing):
    if checkpointing:
        unet.enable_gradient_checkpointing()
    plain, before = predict(unet, *inputs.told), shape_of(unet)
    identity = IdentityAttention(unet, encoder, preview=preview, trainable=True)
    assert shape_of(unet)[:2] != before[:2]
    reference = identity.encode(*inputs.told_of_reference)
    identity.predict(*inputs.told, reference=reference, adapter=identity.adapter(inputs.tokens), preview=0.5)
    identity.detach()
    assert shape_of(unet) == before
    assert torch.equal(predict(unet, *inputs.told), plain)


def test_what_does_not_fit_leaves_the_unet_alone(unet, encoder, preview, load_helper):
    before = shape_of(unet)
    with pytest.raises(IncompatibleModelError, match="world_sdxl_encoder"):
        IdentityAttention(unet, load_helper("tiny/lookahead.py").make_encoder("world_sdxl"))
    bad = LowRankDelta(torch.ones(2, 5), torch.ones(3, 2))
    with pytest.raises(IncompatibleModelError, match="ff.net.2"):
        IdentityAttention(unet, encoder, preview=preview | {f"{BLOCK}.ff.net.2": bad})
    assert shape_of(unet) == before

    set_lora(unet, preview)
    with pytest.raises(ConfigError, match="default"):
        IdentityAttention(unet, encoder)
    unet.unload_lora()
    with pytest.raises(ConfigError, match="LCM LoRA"):
        IdentityAttention(unet, encoder).predict(None, None, None, preview=1.0)


def gradients(identity, inputs, resampler) -> dict[str, torch.Tensor]:
    """Of a loss on a denoising and on a preview pass, behind two encoder passes and before any backward pass."""
    hidden = draws(2, 3, resampler.picture_dim, seed=6)
    loss = 0.0
    for told in ({}, {"preview": 0.7, "adapter_scale": 0.5}):
        reference = identity.encode(*inputs.told_of_reference)
        prediction = identity.predict(
            *inputs.told, reference=reference, adapter=identity.adapter(resampler(hidden)), **told
        )
        loss = loss + (prediction.float() * draws(*prediction.shape, seed=7)).sum()
    loss.backward()
    trained = identity.parameters | {f"resampler.{name}": value for name, value in resampler.named_parameters()}
    found = {name: parameter.grad for name, parameter in trained.items()}
    assert [name for name, grad in found.items() if grad is None or not grad.abs().max() > 0] == []
    return found


def test_checkpointing_leaves_every_gradient_as_it_is(unet, encoder, preview, inputs):
    resampler = encoder.resampler.requires_grad_(True)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        resampler.zero_grad()
        identity = IdentityAttention(unet, encoder, preview=preview, trainable=True)
        found.append(gradients(identity, inputs, resampler))
        ours = {id(parameter) for parameter in identity.parameters.values()}
        assert all(id(value) in ours for value in unet.parameters() if value.requires_grad)
        identity.detach()
    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


def test_checkpointing_that_forgets_the_adapters_is_noticed(unet, encoder, preview, inputs):
    identity = IdentityAttention(unet, encoder, preview=preview, trainable=True)
    unet.enable_gradient_checkpointing()  # diffusers' own, in place of ours
    with pytest.raises(CheckpointError):
        gradients(identity, inputs, encoder.resampler.requires_grad_(True))


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_weights_train_beside_a_smaller_base(unet, encoder, preview, inputs, autocast):
    unet.to(torch.bfloat16)
    identity = IdentityAttention(unet, encoder, preview=preview, trainable=True)
    assert {value.dtype for value in identity.parameters.values()} == {torch.float32}
    small = Inputs(unet, 4, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gradients(identity, small, encoder.resampler.requires_grad_(True))
    assert {grad.dtype for grad in found.values()} == {torch.float32}
    assert all(grad.isfinite().all() for grad in found.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_nobody_keeps_is_freed_with_its_graph(unet, encoder, inputs, checkpointing):
    if checkpointing:
        unet.enable_gradient_checkpointing()
    identity = IdentityAttention(unet, encoder, trainable=True)
    reference = identity.encode(*inputs.told_of_reference)
    prediction = identity.predict(*inputs.told, reference=reference)
    watched = [weakref.ref(tensor) for pair in reference.values() for tensor in pair]
    assert prediction.requires_grad and all(tensor.requires_grad for pair in reference.values() for tensor in pair)
    del reference, prediction
    gc.collect()
    assert [watch for watch in watched if watch() is not None] == []


def test_the_encoder_in_use_is_the_one_that_is_trained(unet, encoder):
    identity = IdentityAttention(unet, encoder, trainable=True)
    written = {name: value.clone() for name, value in encoder_tensors(identity.encoder, torch.float32).items()}
    assert {name for name in written if not name.startswith("resampler.")} == identity.parameters.keys()
    for name, value in encoder_tensors(encoder, torch.float32).items():
        assert torch.equal(written[name], value), name

    with torch.no_grad():
        for parameter in identity.parameters.values():
            parameter += 1
    after = encoder_tensors(identity.encoder, torch.float32)
    for name, parameter in identity.parameters.items():
        assert torch.equal(after[name], written[name] + 1) and torch.equal(after[name], parameter)
    module = next(iter(encoder.lora))
    assert unet.get_submodule(module).lora_A[ENCODER].weight is identity.parameters[f"lora.{module}.down"]


@torch.no_grad()
def test_dropped_tokens_are_cut_out_of_their_block_alone():
    reference = {"a": (draws(2, 3, 4), draws(2, 3, 4, seed=1)), "b": (draws(2, 2, 4), draws(2, 2, 4))}
    left = drop_tokens(reference, {"a": torch.tensor([[True, False, True]])})
    for got, whole in zip(left["a"], reference["a"], strict=True):
        assert torch.equal(got, whole[:, [0, 2]])
    assert left["b"] is reference["b"]
