"""Training-free lookahead guidance in the host: around any guider, and with nothing left on the model."""

import contextlib
import gc
import resource

import pytest
import torch

FAMILIES = ("sd15", "sd21", "sdxl")
THROUGH, FAST = "through the model", "fast"
STEPS = 3


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def scene(comfy, tools):
    """scene(family) -> a model with its VAE, a CFGGuider, and pictures of latents."""

    class Scene:
        def __init__(self, family):
            self.model, self.clip, self.vae = comfy.load(family)
            self.guider = comfy.samplers.CFGGuider(self.model)
            self.guider.set_conds(self.encode("a red ring in the snow"), self.encode(""))
            self.guider.set_cfg(3.0)

        def encode(self, text):
            return comfy.nodes.CLIPTextEncode().encode(self.clip, text)[0]

        def pictures(self, latents):
            return self.vae.decode(latents).movedim(-1, 1) * 2 - 1

        def guided(self, losses, guider=None, *, lora="none", scale=1.0, end=0.9, gradient=THROUGH, vae=True):
            from comfyui_personalize.nodes.preview_guidance import LookaheadPreviewGuidance

            if not isinstance(losses, tuple):
                losses = (host_loss(losses),)
            return LookaheadPreviewGuidance.execute(
                guider or self.guider, losses, lora, scale, 0.0, end, gradient, self.vae if vae else None
            ).args[0]

    return Scene


def host_loss(loss, weight=1.0):
    from comfyui_personalize.nodes.preview_gradient import HostLoss

    return HostLoss(loss, weight)


def plain_colour(red, green, blue):
    from comfyui_personalize.models.lookahead.preview_losses import picture_loss

    with torch.inference_mode(False):
        return picture_loss(torch.tensor([red, green, blue]).view(3, 1, 1).expand(3, 4, 4).clone())


def nothing_missing(pictures):
    """A loss that is zero everywhere: everything is computed, and nothing moves."""
    return pictures.flatten(1).sum(1) * 0


@pytest.fixture
def lora_file(comfy, tools):
    """lora_file(model, ...) -> name of a random LoRA in the host's folder, and its tensors."""
    from pathlib import Path

    from safetensors.torch import save_file

    def write(model, **options):
        tensors = tools.random_lora(model, **options)
        folder = Path(comfy.folder_paths.get_folder_paths("loras")[0])
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "lcm.safetensors")
        return "lcm.safetensors", tensors

    return write


@pytest.fixture
def watched(comfy):
    """watched(model) -> a function that fails when anything of a gradient is left on the model."""

    def look(model):
        modules = list(model.model.modules())
        before = [(module, dict(module._parameters), dict(module._buffers)) for module in modules]

        def check():
            for module, parameters, buffers in before:
                assert "forward" not in module.__dict__
                assert not module._forward_hooks and not module._forward_pre_hooks
                for now, then in ((module._parameters, parameters), (module._buffers, buffers)):
                    assert now.keys() == then.keys() and all(now[name] is then[name] for name in then)
            assert all(parameter.grad is None for parameter in model.model.parameters())

        return check

    return look


@pytest.mark.parametrize("gradient", [THROUGH, FAST])
@pytest.mark.parametrize("family", FAMILIES)
def test_previews_come_closer_and_the_model_stays(tools, scene, watched, family, gradient):
    """Compared with a run that is guided too little to notice.

    A random network does not answer a change of the latent by the same change of its prediction, as "fast" assumes.
    """
    scene, colour, seen = scene(family), plain_colour(0.6, -0.6, -0.6), []

    def loss(pictures):
        value = colour(pictures)
        seen.append(value.item())
        return value

    plain = tools.guide(scene.guider, steps=STEPS)
    check, kept = watched(scene.model), dict(vars(scene.guider))
    guided = scene.guided(loss, gradient=gradient)
    got = tools.guide(guided, steps=STEPS)
    check()
    assert type(guided) is type(scene.guider) and vars(scene.guider) == kept
    tools.guide(scene.guided(loss, gradient=gradient, scale=1e-6), steps=STEPS)
    (first, second), (unguided_first, unguided_second) = seen[:2], seen[2:]
    assert first == unguided_first
    assert second < 0.95 * unguided_second if gradient == THROUGH else second != unguided_second
    assert torch.equal(tools.guide(scene.guider, steps=STEPS), plain)
    assert torch.equal(tools.guide(guided, steps=STEPS), got)


@pytest.mark.parametrize("gradient", [THROUGH, FAST])
@pytest.mark.parametrize("family", ["world_sd15", "world_sdxl"])
def test_pictures_of_a_trained_model_come_closer(tools, scene, family, gradient):
    scene, loss = scene(family), plain_colour(0.6, -0.6, -0.6)
    guiders = (scene.guider, scene.guided(loss, gradient=gradient, scale=0.5, end=0.8))
    before, after = (loss(scene.pictures(tools.guide(guider, steps=6))).item() for guider in guiders)
    assert after < 0.7 * before


def test_scale_zero_and_an_empty_range_give_the_guider_back(scene):
    from comfyui_personalize.nodes.preview_guidance import LookaheadPreviewGuidance

    scene = scene("sd15")
    losses = (host_loss(nothing_missing),)
    for scale, start, end in ((0.0, 0.0, 1.0), (1.0, 0.5, 0.5), (1.0, 0.8, 0.2)):
        given = LookaheadPreviewGuidance.execute(scene.guider, losses, "none", scale, start, end, THROUGH, None)
        assert given.args[0] is scene.guider


def test_steps_outside_the_range_are_the_guiders_own(tools, scene):
    scene = scene("sd15")
    guided = scene.guided(nothing_missing, end=0.5)
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(guided, steps=4)
    # A prediction of two rows, and in the first half the preview, of one.
    assert rows == [2, 1, 2, 1, 2, 2]
    assert torch.equal(got, tools.guide(scene.guider, steps=4))


@pytest.mark.parametrize("gradient", [THROUGH, FAST])
def test_the_lcm_lora_is_on_in_previews_alone(comfy, tools, scene, lora_file, gradient):
    """The first preview is that of a model whose weights the host patched; the guider's predictions are untouched."""
    scene, seen = scene("sdxl"), []

    def remember(pictures):
        seen.append(pictures.detach().clone())
        return nothing_missing(pictures)

    name, tensors = lora_file(scene.model, gain=0.5)
    got = tools.guide(scene.guided(remember, lora=name, gradient=gradient), steps=2)
    assert torch.equal(got, tools.guide(scene.guider, steps=2))
    plain = comfy.samplers.CFGGuider(tools.with_stock_loader(scene.model, tensors))
    plain.set_conds(scene.encode("a red ring in the snow"), scene.encode(""))
    for guider in (plain, scene.guider):
        tools.guide(scene.guided(remember, guider), steps=2)
    with_lora, patched, without = seen[0], *(each for each in seen[len(seen) // 3 :: len(seen) // 3])
    assert tools.relative(with_lora, patched) < 1e-4
    assert tools.relative(with_lora, without) > 1e-2


@pytest.fixture
def one_gradient(comfy, tools, monkeypatch):
    """one_gradient(guided, start) -> the gradient of a run's first step and its loss, by the noisy latent."""
    from comfyui_personalize.nodes import preview_gradient

    def measure(guided, start):
        seen, shift = [], preview_gradient.guided_shift

        def remember(gradient, losses, *rest, **named):
            seen.append((gradient, losses))
            return shift(gradient, losses, *rest, **named)

        with monkeypatch.context() as patch:
            patch.setattr(preview_gradient, "guided_shift", remember)
            noise = torch.zeros_like(start)
            guided.sample(
                noise, start, comfy.samplers.sampler_object("euler"), torch.tensor([3.0, 1.0]), disable_pbar=True
            )
        return seen[0]

    return measure


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_finite_differences(tools, scene, lora_file, one_gradient, family):
    scene = scene(family)
    name, _ = lora_file(scene.model, gain=0.5)
    guided = scene.guided(plain_colour(0.5, 0.0, -0.5), lora=name)
    scale = float(scene.model.model.latent_format.scale_factor)  # what the host makes of a latent first
    start = tools.latent()["samples"] / scale
    gradient, _ = one_gradient(guided, start)
    direction = gradient / gradient.norm()
    step = 0.02
    (_, above), (_, below) = (one_gradient(guided, start + sign * step * direction / scale) for sign in (1, -1))
    slope = float(above - below) / (2 * step)
    assert slope == pytest.approx(float(gradient.norm()), rel=0.03)


def test_recomputed_blocks_see_the_adapters_and_patches_of_their_own_pass(
    tools, scene, lora_file, one_gradient, monkeypatch
):
    """A LoRA on the model, the LCM LoRA, and a patch that acts differently in every block."""
    from comfyui_personalize.nodes import preview_gradient

    scene = scene("sdxl")
    name, _ = lora_file(scene.model, gain=0.5)
    model = tools.with_switchable(scene.model, tools.random_lora(scene.model, seed=3, gain=0.5))

    def by_block(q, k, v, extra):
        return q * (1.0 + 0.1 * extra["block_index"] + 0.05 * extra["block"][1]), k, v

    model.set_model_attn1_patch(by_block)
    guider = type(scene.guider)(model)
    guider.set_conds(scene.encode("a red ring"), scene.encode(""))
    guided, start = scene.guided(plain_colour(0.5, 0.0, -0.5), guider, lora=name), tools.latent(2)["samples"]
    recomputed, _ = one_gradient(guided, start)
    monkeypatch.setattr(preview_gradient, "recomputing", lambda network: contextlib.nullcontext())
    kept, _ = one_gradient(guided, start)
    assert tools.relative(recomputed, kept) < 1e-5


def test_recomputed_blocks_are_edited_by_concepts_as_in_their_own_pass(
    tools, scene, load_helper, one_gradient, monkeypatch
):
    from comfyui_personalize.nodes import preview_gradient
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    scene = scene("sd15")
    concept = load_helper("host/concepts.py").make_concept(scene.model, scene.clip, "<cup>", "cup", gain=10.0)
    start = tools.latent(2)["samples"]

    def gradient(model):
        guider = type(scene.guider)(model)
        guider.set_conds(scene.encode("a red ring"), scene.encode(""))
        return one_gradient(scene.guided(plain_colour(0.5, 0.0, -0.5), guider), start)[0]

    edited = attach(scene.model, [GatedConcept(concept, 0.2, 0.1)], SigmaRange(0.0, 1.0))
    recomputed, plain = gradient(edited), gradient(scene.model)
    monkeypatch.setattr(preview_gradient, "recomputing", lambda network: contextlib.nullcontext())
    assert tools.relative(recomputed, gradient(edited)) < 1e-5
    assert tools.relative(recomputed, plain) > 0.01


@pytest.mark.parametrize("memory", (0, 0.1))
def test_a_network_of_plain_layers_moves_as_a_whole(comfy, memory):
    from comfyui_personalize.nodes.preview_gradient import frozen

    meta = torch.device("meta")
    patcher = frozen(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.PReLU()))
    patcher.load_device = meta
    patcher.partially_load(meta, memory)
    assert {tensor.device for tensor in patcher.model.state_dict().values()} == {meta}
    assert patcher.partially_unload(torch.device("cpu"), 10) == 0


def test_low_vram_gives_the_same_result(comfy, tools, scene, watched):
    scene = scene("sd15")
    model = tools.with_stock_loader(scene.model, tools.random_lora(scene.model, seed=1, gain=0.5))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(scene.encode("a red ring"), scene.encode(""))
    guided = scene.guided(plain_colour(0.6, -0.6, -0.6), guider)
    expected = tools.guide(guided, steps=2)
    loader = comfy.model_management.load_models_gpu

    def load_half(models, **kwargs):
        loader(models, **kwargs)
        guided.model_patcher.partially_unload(model.offload_device, model.model_size() // 2)

    comfy.model_management.load_models_gpu = load_half
    try:
        got = tools.guide(guided, steps=2)
        assert model.model.model_lowvram
    finally:
        comfy.model_management.load_models_gpu = loader
        comfy.model_management.unload_all_models()
    assert tools.relative(got, expected) < 1e-4


def test_it_goes_around_the_reward_guider_and_around_itself(tools, scene):
    from comfyui_personalize.nodes.reward_guidance import RewardGuider

    scene, loss = scene("sd15"), plain_colour(0.6, -0.6, -0.6)
    model = tools.with_switchable(scene.model, tools.random_lora(scene.model, gain=0.5))
    prompts = {"personalized": "a <ring>", "base": "a ring", "negative": ""}
    conds = {name: scene.encode(text) for name, text in prompts.items()}
    reward = RewardGuider(model, text_scale=3.0, reward_scale=2.0, **conds)
    once = scene.guided(loss, reward, scale=0.5)
    twice = scene.guided(loss, once, scale=0.5, gradient=FAST)
    values = [
        loss(scene.pictures(tools.guide(guider, steps=STEPS, sampler="dpmpp_2m"))).item()
        for guider in (reward, once, twice)
    ]
    assert values[0] > values[1] > values[2]
    assert isinstance(twice, RewardGuider)
    assert len(twice.model_patcher.get_nested_additional_models()) == 1


def test_an_inpainting_mask_keeps_the_rest_and_the_preview_shows_it(comfy, tools, scene, monkeypatch):
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    from comfyui_personalize.nodes import preview_gradient

    scene, loss, seen = scene("sd15"), plain_colour(0.6, -0.6, -0.6), []
    gradient_of = preview_gradient.preview_gradient

    def watch(latents, *rest):
        seen.append(latents.clone())
        return gradient_of(latents, *rest)

    monkeypatch.setattr(preview_gradient, "preview_gradient", watch)
    mask = torch.zeros(1, 64, 64)
    mask[..., :32] = 1
    start = {**tools.latent(), "noise_mask": mask}
    sigmas = comfy.samplers.KSampler(scene.model, STEPS, torch.device("cpu"), "euler", "normal").sigmas
    run = getattr(SamplerCustomAdvanced, "execute", None) or SamplerCustomAdvanced().sample
    results = []
    for guider in (scene.guider, scene.guided(loss)):
        result = run(Noise_RandomNoise(7), guider, comfy.samplers.sampler_object("euler"), sigmas, start)
        results.append((result if isinstance(result, tuple) else result.args)[0]["samples"])
    assert torch.equal(results[0][..., 4:], results[1][..., 4:])
    assert tools.relative(results[1][..., :4], results[0][..., :4]) > 0.05
    before, after = (loss(scene.pictures(latents)).item() for latents in results)
    assert after < before
    kept = scene.model.model.process_latent_in(start["samples"])[..., 4:]
    assert seen and all(torch.equal(latents[..., 4:], kept) for latents in seen)


@pytest.mark.parametrize("gradient", [THROUGH, FAST])
def test_what_ends_a_run_leaves_the_model_as_it_was(comfy, tools, scene, watched, gradient):
    scene = scene("sdxl")
    plain = tools.guide(scene.guider, steps=STEPS)
    check = watched(scene.model)

    def fail(pictures):
        raise RuntimeError("a loss that fails")

    def cancel(pictures):
        comfy.model_management.interrupt_current_processing(True)
        return nothing_missing(pictures)

    with pytest.raises(RuntimeError, match="a loss that fails"):
        tools.guide(scene.guided(fail, gradient=gradient), steps=STEPS)
    check()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tools.guide(scene.guided(cancel, gradient=gradient), steps=STEPS)
    check()
    assert torch.equal(tools.guide(scene.guider, steps=STEPS), plain)


@pytest.mark.slow
def test_nothing_grows_over_twenty_runs(tools, scene):
    scene = scene("sd15")
    guided = scene.guided(plain_colour(0.6, -0.6, -0.6))

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        tools.guide(guided, steps=2)
    count, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        tools.guide(guided, steps=2, seed=seed)
    assert tensors() == count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 * 1024  # KiB


def test_a_controlnet_counts_as_constant(comfy):
    """Its residuals reach the preview, no gradient reaches it, and it is run as the host runs it."""
    from comfyui_personalize.nodes.differentiable import FixedControl

    class Control:
        def get_control(self, x, timestep, cond, batched_number, transformer_options):
            self.ran = torch.is_inference_mode_enabled(), x.requires_grad
            return {"middle": [torch.full((len(x), 1, 1, 1), 3.0)], "input": [None]}

    control = Control()
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.ones(2, 4, 8, 8, requires_grad=True)
        residuals = FixedControl(control).get_control(x, None, {}, 1, {})
        assert torch.autograd.grad((x * residuals["middle"][0]).sum(), x)[0].eq(3).all()
    assert control.ran == (True, False) and residuals["input"] == [None]


def test_the_tiny_decoder_of_the_host_serves_without_a_vae(comfy, tools, scene):
    from pathlib import Path

    from safetensors.torch import save_file

    from comfyui_personalize.models.errors import ConfigError, FormatError

    scene, loss = scene("sd15"), plain_colour(0.6, -0.6, -0.6)
    folder = Path(comfy.folder_paths.get_folder_paths("vae_approx")[0])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "taesd_decoder.safetensors"
    with pytest.raises(ConfigError, match=r"put taesd_decoder.safetensors into the folder models/vae_approx"):
        scene.guided(loss, vae=False)
    try:
        save_file({"1.weight": torch.zeros(2)}, path)
        with pytest.raises(FormatError, match=r"taesd_decoder.safetensors is no TAESD decoder"):
            scene.guided(loss, vae=False)
        weights = scene.vae.first_stage_model.taesd_decoder.state_dict()
        save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
        plain, got = (tools.guide(guider, steps=STEPS) for guider in (scene.guider, scene.guided(loss, vae=False)))
        decoder = scene.vae.first_stage_model.taesd_decoder

        def pictures(latents):
            return decoder(scene.model.model.process_latent_in(latents)) * 2 - 1

        assert loss(pictures(got)).item() < 0.95 * loss(pictures(plain)).item()
    finally:
        path.unlink()


def test_what_cannot_be_guided_is_refused(comfy, tools, scene):
    from comfyui_personalize.models.errors import ConfigError, IncompatibleModelError
    from comfyui_personalize.nodes.preview_guidance import LookaheadPreviewGuidance

    scene = scene("sd15")
    empty = comfy.samplers.CFGGuider(scene.model)
    with pytest.raises(ConfigError, match="a CFGGuider says neither its model nor its positive prompt"):
        scene.guided(nothing_missing, empty)
    with pytest.raises(ConfigError, match="a object says neither"):
        scene.guided(nothing_missing, object())
    with pytest.raises(ConfigError, match="all preview losses have weight 0"):
        scene.guided(())

    class WideVAE:
        latent_dim, latent_channels = 2, 16

    with pytest.raises(IncompatibleModelError, match="decodes latents of 16 channels, but this model's have 4"):
        LookaheadPreviewGuidance.execute(
            scene.guider, (host_loss(nothing_missing),), "none", 1.0, 0.0, 1.0, FAST, WideVAE()
        )
    with pytest.raises(ConfigError, match="must give one value for each of 1 pictures"):
        tools.guide(scene.guided(lambda pictures: pictures.mean()), steps=1)
