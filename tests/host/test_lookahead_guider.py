"""The lookahead guider in the host: what it costs, what it leaves alone, and how it composes."""

import gc
import resource

import pytest
import torch


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def person(comfy, load_helper):
    """person(family="sdxl", people=1, pictures=1, side=8, ...) -> model, encoder, identity and prompts together."""
    tiny = load_helper("tiny/lookahead.py")

    class Person:
        def __init__(self, family="sdxl", *, people=1, pictures=1, side=(8, 8), seed=0):
            from comfyui_personalize.models.lookahead import IdentityTokens
            from comfyui_personalize.models.lookahead.identity import Identity, fingerprint

            self.model, clip, _ = comfy.load(family)
            self.encoder = tiny.make_encoder(family)
            draws = torch.Generator().manual_seed(seed)
            width = next(iter(self.encoder.adapter.values()))[0].shape[1]
            cond, uncond = (torch.randn(people, 4, width, generator=draws) for _ in range(2))
            latents = torch.randn(people, pictures, 4, *side, generator=draws) * 5
            self.identity = Identity(IdentityTokens(cond, uncond), latents, fingerprint(self.encoder.resampler))
            encode = comfy.nodes.CLIPTextEncode().encode
            self.positive, self.negative = encode(clip, "a clay person in paris")[0], encode(clip, "blurry")[0]

        def only(self, *people):
            """The identity of some of the people."""
            from dataclasses import replace

            from comfyui_personalize.models.lookahead import IdentityTokens

            rows = list(people)
            tokens = IdentityTokens(self.identity.tokens.cond[rows], self.identity.tokens.uncond[rows])
            return replace(self.identity, tokens=tokens, latents=self.identity.latents[rows])

        def guider(self, model=None, **settings):
            from comfyui_personalize.nodes.lookahead_guider import LookaheadGuider

            own = {"encoder": self.encoder, "identity": self.identity}
            prompts = {"positive": self.positive, "negative": self.negative}
            return LookaheadGuider(model or self.model, **own | prompts | settings)

    return Person


def batch_of(tools, count, **sizes):
    return tools.latent(batch=count, **sizes) | {
        "samples": torch.zeros_like(tools.latent(batch=count, **sizes)["samples"])
    }


@pytest.mark.parametrize("family", ("sdxl", "world_sdxl"))
@pytest.mark.parametrize("sampler", ("euler", "dpmpp_2m"))
def test_off_in_every_way_gives_the_plain_model_bit_for_bit(tools, person, family, sampler):
    scene = person(family)
    plain = tools.ksample(scene.model, scene.positive, scene.negative, cfg=5.0, sampler=sampler)
    for settings in (
        {"mode": "adapter only", "text_scale": 5.0},
        {"sharing_strength": 0.0, "text_scale": 3.0, "full_scale": 2.0},
        {"start_percent": 0.4, "end_percent": 0.4, "text_scale": 3.0, "full_scale": 2.0},
    ):
        got = tools.guide(scene.guider(adapter_scale=0.0, **settings), sampler=sampler)
        assert torch.equal(got, plain), settings


def test_everything_on_shows(tools, person):
    scene = person()
    plain = tools.ksample(scene.model, scene.positive, scene.negative, cfg=5.0)
    adapter = tools.guide(scene.guider(mode="adapter only", text_scale=5.0))
    shared = tools.guide(scene.guider(adapter_scale=0.0))
    both = tools.guide(scene.guider())
    pictures = [plain, adapter, shared, both]
    differences = [tools.relative(a, b) for i, a in enumerate(pictures) for b in pictures[i + 1 :]]
    assert min(differences) > 0.02


def test_rows_and_passes(tools, person):
    scene = person()
    for settings, expected in (
        ({}, [2, 4]),
        ({"few_step": True}, [1, 1]),
        ({"few_step": True, "mode": "adapter only"}, [1]),
        ({"mode": "adapter only"}, [2]),
        ({"sharing_strength": 0.0}, [2]),
        ({"start_percent": 0.5, "end_percent": 0.5}, [2]),
        ({"identity_scale": 0.0}, [1, 3]),
        ({"text_scale": 0.0, "identity_scale": 1.0, "full_scale": 0.0}, [1, 1]),
        ({"mode": "adapter only", "text_scale": 1.0}, [1]),
    ):
        with tools.CountRows(scene.model) as rows:
            tools.guide(scene.guider(**settings), steps=2)
        assert rows == expected * 2, settings


def test_a_batch_shares_one_encoder_pass_where_the_noise_is_the_same(tools, person):
    scene = person()
    start = batch_of(tools, 3)
    with tools.CountRows(scene.model) as rows:
        tools.guide(scene.guider(), steps=1, start=start)
        tools.guide(scene.guider(reference_noise="the first picture's"), steps=1, start=start)
        tools.guide(scene.guider(reference_noise="none"), steps=1, start=start)
    assert rows == [6, 12, 2, 12, 2, 12]


def test_a_sampler_that_comes_back_to_a_noise_level_finds_the_reference_there(tools, person):
    scene = person()
    with tools.CountRows(scene.model) as rows:
        tools.guide(scene.guider(), steps=3, sampler="heun")
    assert rows.count(4) == 5  # 2 + 2 + 1 evaluations
    assert rows.count(2) == 3  # of three noise levels


@pytest.mark.parametrize("people", (1, 3))
def test_rows_of_a_batch_do_not_see_each_other(tools, person, people):
    scene = person(people=people)
    start = batch_of(tools, 3)
    together = tools.guide(scene.guider(), start=start)
    for row in range(3):
        identity = scene.only(row if people == 3 else 0)
        noise = torch.randn(3, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(1))
        alone = scene.guider(identity=identity)
        import comfy.samplers

        model = alone.model_patcher
        sigmas = comfy.samplers.KSampler(model, 3, model.load_device, "euler", "normal").sigmas
        zeros = torch.zeros(1, 4, 8, 8)
        got = alone.sample(noise[row : row + 1], zeros, comfy.samplers.sampler_object("euler"), sigmas, seed=1)
        assert tools.relative(got, together[row : row + 1]) < 1e-4


def test_a_prompt_for_each_picture(tools, person):
    scene = person()
    positive = [[torch.cat([scene.positive[0][0], scene.negative[0][0]]), dict(scene.positive[0][1])]]
    pooled = [conditioning[0][1]["pooled_output"] for conditioning in (scene.positive, scene.negative)]
    positive[0][1]["pooled_output"] = torch.cat(pooled)
    start = batch_of(tools, 2)
    noise_free = {"reference_noise": "the first picture's", "encoder_prompt": scene.positive}
    both = tools.guide(scene.guider(positive=positive, **noise_free), start=start)
    first = tools.guide(scene.guider(**noise_free), start=start)
    second = tools.guide(scene.guider(positive=scene.negative, **noise_free), start=start)
    assert tools.relative(both[:1], first[:1]) < 1e-4
    assert tools.relative(both[1:], second[1:]) < 1e-4


@pytest.mark.parametrize("side", ((8, 8), (16, 8), (12, 12)))
def test_references_of_any_size_and_number(tools, person, side):
    """Batched rows agree with predictions of one row each, which need neither repeated tokens nor a bias."""
    scene = person(pictures=2, side=side)
    scales = {"text_scale": 2.0, "full_scale": 1.5, "identity_scale": 0.5}
    together = tools.guide(scene.guider(**scales), steps=1)
    ones = []
    for settings in (
        {"few_step": True, "mode": "adapter only"},
        {"mode": "adapter only", "text_scale": 0.0},
        {"few_step": True},
        {"text_scale": 0.0, "full_scale": 0.0, "identity_scale": 1.0},
    ):
        ones.append(tools.guide(scene.guider(**settings), steps=1))
    text, uncond, shared, shared_uncond = ones
    expected = uncond + 2.0 * (text - uncond) + 1.5 * (shared - uncond) + 0.5 * (shared_uncond - uncond)
    assert tools.relative(together, expected) < 1e-4


def prompt_batch(*conditionings):
    """One conditioning with the rows of several."""
    pooled = torch.cat([conditioning[0][1]["pooled_output"] for conditioning in conditionings])
    embeds = torch.cat([conditioning[0][0] for conditioning in conditionings])
    return [[embeds, {**conditionings[0][0][1], "pooled_output": pooled}]]


@pytest.mark.parametrize("people", (1, 2))
def test_several_pictures_go_with_the_prompt_of_their_row(tools, person, people):
    scene = person(people=people, pictures=2)
    start, alike = batch_of(tools, 2), {"reference_noise": "none"}
    both = tools.guide(scene.guider(positive=prompt_batch(scene.positive, scene.negative), **alike), start=start)
    for row, prompt in enumerate((scene.positive, scene.negative)):
        identity = scene.only(row if people == 2 else 0)
        alone = tools.guide(scene.guider(positive=prompt, identity=identity, **alike), start=start)
        assert tools.relative(both[row], alone[row]) < 1e-4


def sample_rows(comfy, guider, noise, sampler="euler", steps=3):
    sigmas = comfy.samplers.KSampler(guider.model_patcher, steps, torch.device("cpu"), sampler, "normal").sigmas
    sampler = comfy.samplers.sampler_object(sampler)
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True, seed=1)


@pytest.mark.parametrize("side", ((8, 8), (12, 8)))
def test_the_order_of_rows_does_not_matter(comfy, person, side):
    scene = person(side=side)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    one, other = (sample_rows(comfy, scene.guider(), rows) for rows in (noise, noise.flip(0)))
    assert float((other.flip(0) - one).abs().max() / one.abs().max()) < 1e-4


def test_a_second_stage_without_noise_still_noises_the_reference(comfy, tools, person):
    from comfyui_personalize.nodes.identity_roles import RUN

    scene = person()
    guider, seen = scene.guider(), []

    def watch(executor, *args, **kwargs):
        run = args[2]["model_options"]["transformer_options"][RUN]
        seen.append(run.noise)
        return executor(*args, **kwargs)

    guider.model_patcher.add_wrapper_with_key("sampler_sample", "watch", watch)
    sample_rows(comfy, guider, torch.zeros(1, 4, 8, 8))
    assert float(seen[0].std()) == pytest.approx(1.0, abs=0.2)


def test_areas_of_the_prompt_are_not_the_references(comfy, tools, person):
    scene = person()
    nodes = comfy.nodes
    (part,) = nodes.ConditioningSetArea().append(scene.negative, 32, 32, 32, 32, 1.0)
    (regional,) = nodes.ConditioningCombine().combine(scene.positive, part)
    settings = {"encoder_prompt": scene.positive}
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(scene.guider(positive=regional, **settings), steps=1)
    assert rows[0] == 2 and sum(rows) == 2 + 4 + 4  # one encoder pass, the picture and the area
    whole = tools.guide(scene.guider(**settings), steps=1)
    assert tools.relative(got[..., :4, :4], whole[..., :4, :4]) < 1e-4 < tools.relative(got, whole)


def test_a_region_is_cut_as_areas_are(comfy, tools, person):
    """In an area that a region covers, it acts as if it covered everything; elsewhere not at all."""
    scene = person()
    (part,) = comfy.nodes.ConditioningSetArea().append(scene.positive, 32, 64, 32, 0, 1.0)
    right = torch.zeros(1, 64, 64)
    right[:, :, 32:] = 1
    settings = {"positive": part, "negative": scene.negative, "few_step": True, "encoder_prompt": scene.positive}
    covered, everywhere, nowhere = (
        tools.guide(scene.guider(region=region, **settings), steps=1)
        for region in (right, torch.ones(1, 64, 64), torch.zeros(1, 64, 64))
    )
    assert tools.relative(covered, everywhere) < 1e-4
    assert tools.relative(nowhere, everywhere) > 1e-3


def test_few_steps_with_everything_off_are_the_plain_model_in_any_sampler(tools, person):
    scene = person()
    for sampler in ("euler", "euler_cfg_pp"):
        plain = tools.ksample(scene.model, scene.positive, scene.negative, cfg=1.0, sampler=sampler)
        settings = {"few_step": True, "mode": "adapter only", "adapter_scale": 0.0}
        assert torch.equal(tools.guide(scene.guider(**settings), sampler=sampler), plain), sampler


def test_concepts_act_on_the_picture_alone(comfy, tools, person, load_helper):
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.identity_roles import RUN
    from comfyui_personalize.nodes.rank_one_edits import GatedConcept, attach

    scene, kept = person(), []
    clip = comfy.load("sdxl")[1]
    concept = load_helper("host/concepts.py").make_concept(scene.model, clip, "<cup>", "cup")
    edited = attach(scene.model, [GatedConcept(concept, 0.2, 0.1)], SigmaRange(0.0, 1.0))

    def watch(executor, x, *args, **kwargs):
        run = (args[4] if len(args) > 4 else kwargs["transformer_options"])[RUN]
        kept.append({name: dict(blocks) for name, blocks in run.references.items()})
        return executor(x, *args, **kwargs)

    pictures = []
    for model in (scene.model, edited):
        guider = scene.guider(model)
        guider.model_patcher.add_wrapper_with_key("diffusion_model", "watch", watch)
        pictures.append(tools.guide(guider, steps=1))
    plain, under = (next(one for one in calls if one) for calls in (kept[:2], kept[2:]))
    for name, blocks in plain.items():
        for block, pair in blocks.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, under[name][block]))
    assert tools.relative(pictures[1], pictures[0]) > 1e-3


def test_strength_fades_evenly(tools, person):
    scene = person()
    off, on = (tools.guide(scene.guider(sharing_strength=strength), steps=1) for strength in (1e-4, 1.0))
    plain = tools.guide(scene.guider(start_percent=1.0), steps=1)
    half = tools.guide(scene.guider(sharing_strength=0.5), steps=1)
    assert tools.relative(off, plain) < 1e-2
    distance = float((on - plain).norm())
    assert 0.2 * distance < float((half - plain).norm()) < 0.95 * distance


def test_region(tools, person):
    scene = person()
    full = tools.guide(scene.guider(), steps=2)
    white = tools.guide(scene.guider(region=torch.ones(1, 64, 64)), steps=2)
    assert tools.relative(white, full) < 1e-4
    off = tools.guide(scene.guider(adapter_scale=0.0, sharing_strength=0.0), steps=2)
    black = tools.guide(scene.guider(region=torch.zeros(1, 64, 64)), steps=2)
    assert tools.relative(black, off) < 1e-4
    half = torch.zeros(1, 64, 64)
    half[:, :, 32:] = 1
    left = tools.guide(scene.guider(region=half), steps=2)
    distance = (left - off).abs().mean((0, 1, 2))
    assert distance[6:].mean() > distance[:2].mean() > 0  # convolutions carry some of it over
    one_each = tools.guide(scene.guider(region=torch.cat([half, half.flip(2)])), start=batch_of(tools, 2), steps=2)
    assert (
        tools.relative(one_each[:1], tools.guide(scene.guider(region=half), start=batch_of(tools, 2), steps=2)[:1])
        < 1e-4
    )


def test_a_lora_of_the_user_works_beside_it(tools, person):
    """On the queries too, which the adapter uses: as if it had been merged into the weights."""
    scene = person()
    tensors = tools.random_lora(scene.model, every=1, gain=0.5)
    settings = {"mode": "adapter only", "text_scale": 5.0}
    merged = tools.guide(scene.guider(tools.with_stock_loader(scene.model, tensors), **settings))
    switchable = tools.guide(scene.guider(tools.with_switchable(scene.model, tensors), **settings))
    assert tools.relative(switchable, merged) < 1e-4
    assert tools.relative(merged, tools.guide(scene.guider(**settings))) > 0.01


def test_a_switchable_lora_leaves_the_encoder_pass_alone(tools, person):
    from comfyui_personalize.nodes.identity_roles import RUN

    scene = person()
    kept = []

    def watch(executor, x, *args, **kwargs):
        result = executor(x, *args, **kwargs)
        run = args[4].get(RUN) if len(args) > 4 else kwargs["transformer_options"].get(RUN)
        kept.append({name: dict(blocks) for name, blocks in run.references.items()})  # an encoder pass never gets here
        return result

    for model in (scene.model, tools.with_switchable(scene.model, tools.random_lora(scene.model, every=1))):
        guider = scene.guider(model)
        guider.model_patcher.add_wrapper_with_key("diffusion_model", "watch", watch)
        tools.guide(guider, steps=1)
    first, second = kept
    assert first is not second and set(first) == {"text", "uncond"}
    for name, blocks in first.items():
        for block, pair in blocks.items():
            assert all(torch.equal(a, b) for a, b in zip(pair, second[name][block]))


def test_rules_of_other_nodes_hold_for_the_text_term(tools, person):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    scene = person()
    model = RescaleCFG().patch(scene.model, 0.7)[0]
    settings = {"mode": "adapter only", "text_scale": 5.0, "adapter_scale": 0.0}
    got = tools.guide(scene.guider(model, **settings))
    expected = tools.ksample(model, scene.positive, scene.negative, cfg=5.0)
    assert tools.relative(got, expected) < 1e-5
    shared = tools.guide(scene.guider(model))
    assert tools.relative(shared, tools.guide(scene.guider())) > 1e-3


def test_low_vram_gives_the_same_result(comfy, tools, person):
    scene = person()
    guider = scene.guider()
    expected = tools.guide(guider)
    comfy.model_management.unload_all_models()
    patcher, loader = guider.model_patcher, comfy.model_management.load_models_gpu

    def load_half(models, **kwargs):
        loader(models, **kwargs)
        patcher.partially_unload(patcher.offload_device, patcher.model_size() // 2)

    comfy.model_management.load_models_gpu = load_half
    try:
        got = tools.guide(guider)
        assert scene.model.model.model_lowvram
    finally:
        comfy.model_management.load_models_gpu = loader
        comfy.model_management.unload_all_models()
    assert tools.relative(got, expected) < 1e-5


def test_eight_bit_weights_act_like_weights_that_were_rounded(comfy, tools, person, checkpoint):
    import comfy.sd

    eight_bit = {"dtype": torch.float8_e4m3fn}
    small = comfy.sd.load_checkpoint_guess_config(str(checkpoint("sdxl")), output_clip=False, model_options=eight_bit)[
        0
    ]
    rounded = comfy.sd.load_checkpoint_guess_config(str(checkpoint("sdxl")), output_clip=False)[0]
    for parameter in rounded.model.diffusion_model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)
    assert next(small.model.diffusion_model.parameters()).dtype == torch.float8_e4m3fn
    scene = person()
    got, expected = (tools.guide(scene.guider(model), steps=2) for model in (small, rounded))
    assert tools.relative(got, expected) < 1e-3
    assert tools.relative(got, tools.guide(scene.guider(), steps=2)) > 1e-3


@pytest.fixture
def nothing_loaded(comfy):
    """The host's list of loaded models without those of other tests, of which it also keeps some that are dropped."""

    def unload():
        comfy.model_management.unload_all_models()
        comfy.model_management.current_loaded_models.clear()

    return unload


def test_nothing_stays_on_the_model(comfy, tools, person, nothing_loaded):
    scene = person()
    nothing_loaded()  # not even the text encoder
    before = tools.ksample(scene.model, scene.positive, scene.negative)
    guider = scene.guider()
    for seed in range(3):
        tools.guide(guider, seed=seed)
    resident = [loaded.model.model for loaded in comfy.model_management.current_loaded_models]
    assert resident and all(one is scene.model.model for one in resident)  # no second UNet, and nothing else
    gc.collect()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        tools.guide(guider, seed=seed)
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 20_000  # kilobytes
    modules = scene.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert torch.equal(tools.ksample(scene.model, scene.positive, scene.negative), before)


def test_guiders_that_are_dropped_leave_nothing_loaded(comfy, tools, person, nothing_loaded):
    scene, memory = person(), comfy.model_management
    nothing_loaded()
    for seed in range(6):
        tools.guide(scene.guider(), steps=1, seed=seed)
    gc.collect()
    assert len(memory.current_loaded_models) == 1
    assert not any(loaded.is_dead() for loaded in memory.current_loaded_models)
    memory.unload_all_models()
    assert memory.current_loaded_models == []


def test_an_error_inside_the_unet_leaves_no_hook(tools, person):
    scene = person()
    guider = scene.guider()

    def fail(executor, *args, **kwargs):
        raise RuntimeError("out of memory")

    guider.model_patcher.add_wrapper_with_key("diffusion_model", "fail", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tools.guide(guider)
    modules = scene.model.model.diffusion_model.modules()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_inpainting_keeps_the_rest(tools, person):
    scene = person()
    start = tools.latent()
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    got = tools.guide(scene.guider(), start=start | {"noise_mask": mask})
    assert tools.relative(got[..., :3], start["samples"][..., :3]) < 1e-4


def test_controlnet_acts_on_the_picture_alone(comfy, tools, person, control_net):
    scene = person()
    control, hint = control_net(scene.model), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    apply = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet
    positive, negative = apply(scene.positive, scene.negative, control, hint, 0.8, 0.0, 1.0)
    with tools.CountRows(scene.model) as rows:
        controlled = tools.guide(scene.guider(positive=positive, negative=negative), steps=2)
    assert rows == [2, 4] * 2
    assert tools.relative(controlled, tools.guide(scene.guider(), steps=2)) > 1e-3


# What is refused


def refusal(error, call):
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_a_model_of_another_family_is_refused(comfy, person):
    from comfyui_personalize.models.errors import IncompatibleModelError

    scene = person()
    for family in ("sd15", "sd21"):
        message = refusal(IncompatibleModelError, lambda family=family: scene.guider(comfy.load(family)[0]))
        assert "SDXL" in message


def test_an_encoder_of_another_width_is_refused(person, load_helper):
    from comfyui_personalize.models.errors import IncompatibleModelError

    scene = person()
    other = load_helper("tiny/lookahead.py").make_encoder("world_sdxl")
    assert "SDXL" in refusal(IncompatibleModelError, lambda: scene.guider(encoder=other))


def test_an_identity_of_another_encoder_is_refused(person, load_helper):
    from comfyui_personalize.models.errors import IncompatibleModelError

    scene = person()
    other = load_helper("tiny/lookahead.py").make_encoder("sdxl", seed=1)
    assert "another encoder" in refusal(IncompatibleModelError, lambda: scene.guider(encoder=other))


def test_sharing_needs_a_picture_and_a_trained_encoder(person):
    from dataclasses import replace

    from comfyui_personalize.models.errors import ConfigError

    scene = person()
    bare = replace(scene.identity, latents=None)
    assert "made without a VAE" in refusal(ConfigError, lambda: scene.guider(identity=bare))
    plain = replace(scene.encoder, lora={}, copies={block: (None, None) for block in scene.encoder.copies})
    assert "plain IP-Adapter" in refusal(ConfigError, lambda: scene.guider(encoder=plain))
    scene.guider(identity=bare, encoder=plain, mode="adapter only")


def test_rescaling_needs_a_prediction_with_text(person):
    from comfyui_personalize.models.errors import ConfigError

    scene = person()
    message = refusal(ConfigError, lambda: scene.guider(text_scale=0.0, full_scale=0.0, rescale=0.7))
    assert "set rescale to 0" in message


def test_an_attention_that_another_node_replaced_is_refused_where_it_matters(tools, person):
    from comfyui_personalize.models.errors import ConfigError

    scene = person()
    model = scene.model.clone()
    model.set_model_attn1_replace(lambda q, k, v, options: q, "middle", 0)
    assert "adapter only" in refusal(ConfigError, lambda: tools.guide(scene.guider(model)))
    assert tools.guide(scene.guider(model, mode="adapter only")).isfinite().all()


def test_masks_that_do_not_go_with_the_batch_are_refused(tools, person):
    from comfyui_personalize.models.errors import ConfigError

    scene = person()
    guider = scene.guider(region=torch.ones(2, 64, 64))
    assert "2 masks for a batch of 3" in refusal(ConfigError, lambda: tools.guide(guider, start=batch_of(tools, 3)))
    flat = tools.guide(scene.guider(region=torch.ones(64, 64)), steps=1)
    assert tools.relative(flat, tools.guide(scene.guider(), steps=1)) < 1e-4


def test_a_batch_of_another_size_than_the_people_is_refused(tools, person):
    from comfyui_personalize.models.errors import ConfigError

    scene = person(people=2)
    message = refusal(ConfigError, lambda: tools.guide(scene.guider(), start=batch_of(tools, 3)))
    assert "2 people for a batch of 3" in message
