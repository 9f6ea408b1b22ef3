"""Reward guidance in the host: against a second, weight-patched model, and row by row."""

import gc
import logging
import resource

import pytest
import torch

FAMILIES = ("sd15", "sd21", "sdxl")


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def scene(comfy, tools):
    """scene(family) -> namespace with the plain and the personalized model and the three conditionings."""

    class Scene:
        def __init__(self, family, kind="lora"):
            self.plain, clip, _ = comfy.load(family)
            self.tensors = tools.random_lora(self.plain, kind, gain=0.5)
            self.model = tools.with_switchable(self.plain, self.tensors)
            prompts = {"personalized": "a <dog> in paris", "base": "a dog in paris", "negative": "blurry"}
            self.conds = {name: comfy.nodes.CLIPTextEncode().encode(clip, text)[0] for name, text in prompts.items()}

        def guider(self, model=None, **settings):
            from comfyui_personalize.nodes.reward_guidance import RewardGuider

            settings = {"text_scale": 5.0, "reward_scale": 2.0, **self.conds, **settings}
            return RewardGuider(model or self.model, **settings)

    return Scene


@pytest.fixture
def reference(comfy, tools, tiny_checkpoint):
    """reference(family, scene, loras, ...) -> a guider that asks other copies of the model, patched in their weights.

    Every prediction is a forward of its own.
    """
    import comfy.sd

    def make(family, scene, *, text_scale=5.0, rewards, rescale=None):
        """``rewards``: (conditioning, LoRAs, scale) each."""
        copies = []
        for _, loras, _ in rewards:
            patched = comfy.sd.load_checkpoint_guess_config(str(tiny_checkpoint(family)), output_clip=False)[0]
            for tensors in loras:
                patched = tools.with_stock_loader(patched, tensors)
            patched.patch_model(patched.load_device)
            patched.pre_run()
            copies.append(patched)

        class Reference(comfy.samplers.CFGGuider):
            def predict_noise(self, x, timestep, model_options=None, seed=None):
                def predict(model, name):
                    conds = [self.conds[name]]
                    return comfy.samplers.calc_cond_batch(model, conds, x, timestep, model_options)[0]

                base, negative = predict(self.inner_model, "base"), predict(self.inner_model, "negative")
                guided = negative + text_scale * (base - negative)
                for index, (copy, (_, _, scale)) in enumerate(zip(copies, rewards)):
                    guided = guided + scale * (predict(copy.model, f"reward_{index}") - base)
                return guided if rescale is None else rescale(guided, base, x, timestep.view(-1, 1, 1, 1))

        guider = Reference(scene.plain)
        rewarded = {f"reward_{index}": conditioning for index, (conditioning, _, _) in enumerate(rewards)}
        guider.inner_set_conds({"base": scene.conds["base"], "negative": scene.conds["negative"], **rewarded})
        guider.copies = copies
        return guider

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ("lora", "dora"))
def test_equals_separate_forwards_of_a_weight_patched_model(tools, scene, reference, family, kind):
    """Batch of two and a size that is no multiple of eight; one forward of six rows a step."""
    scene = scene(family, kind)
    start = tools.latent(2, 9, 7)
    expected = tools.guide(
        reference(family, scene, rewards=[(scene.conds["personalized"], (scene.tensors,), 2.0)]), start=start, steps=2
    )
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(scene.guider(), start=start, steps=2)
    assert rows == [6, 6]
    assert tools.relative(got, expected) < 1e-5
    without = tools.guide(scene.guider(reward_scale=0.0), start=start, steps=2)
    assert tools.relative(without, expected) > 1e-3


@pytest.mark.parametrize("sampler", ("euler", "dpmpp_2m", "heun", "dpmpp_sde", "ddim", "uni_pc"))
def test_samplers_follow_the_reference(tools, scene, reference, sampler):
    scene = scene("sd15")
    expected = tools.guide(
        reference("sd15", scene, rewards=[(scene.conds["personalized"], (scene.tensors,), 2.0)]), sampler=sampler
    )
    assert tools.relative(tools.guide(scene.guider(), sampler=sampler), expected) < 1e-4


@pytest.mark.slow
def test_every_stock_sampler_runs(comfy, tools, scene):
    scene = scene("sd15")
    for sampler in comfy.samplers.KSampler.SAMPLERS:
        with tools.CountRows(scene.model) as rows:
            result = tools.guide(scene.guider(), sampler=sampler, steps=2)
        assert torch.isfinite(result).all(), sampler
        assert set(rows) == {3}, sampler
        plain = tools.ksample(
            scene.plain, scene.conds["base"], scene.conds["negative"], cfg=5.0, sampler=sampler, steps=2
        )
        assert torch.equal(tools.guide(scene.guider(reward_scale=0.0), sampler=sampler, steps=2), plain), sampler


def test_samplers_that_use_the_negative_prediction_get_it_at_scale_one(tools, scene):
    scene = scene("sd15")
    plain = tools.ksample(scene.plain, scene.conds["base"], scene.conds["negative"], cfg=1.0, sampler="euler_cfg_pp")
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(scene.guider(text_scale=1.0, reward_scale=0.0), sampler="euler_cfg_pp")
    assert rows == [2, 2, 2]
    assert torch.equal(got, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("settings", "expected_rows"),
    [
        ({}, [3, 3, 3, 3]),
        ({"text_scale": 1.0}, [2, 2, 2, 2]),
        ({"reward_scale": 0.0}, [2, 2, 2, 2]),
        ({"text_scale": 1.0, "reward_scale": 0.0}, [1, 1, 1, 1]),
        ({"start_percent": 0.5}, [2, 2, 3, 3]),
        ({"end_percent": 0.5}, [3, 3, 2, 2]),
        ({"end_percent": 0.0}, [2, 2, 2, 2]),
    ],
)
def test_rows_that_cancel_are_not_computed(tools, scene, family, settings, expected_rows):
    scene = scene(family)
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(scene.guider(**settings), steps=4)
    assert rows == expected_rows
    if settings.get("reward_scale") == 0.0 or settings.get("end_percent") == 0.0:
        cfg = settings.get("text_scale", 5.0)
        plain = tools.ksample(scene.plain, scene.conds["base"], scene.conds["negative"], cfg=cfg, steps=4)
        assert torch.equal(got, plain)


def test_the_range_is_read_once_a_step_and_the_whole_range_never(tools, scene):
    class Sigma:
        """A timestep that counts how often its value is fetched."""

        read = 0

        def __getitem__(self, _index):
            Sigma.read += 1
            return 1.5

    from comfyui_personalize.nodes.guiding import SigmaRange

    sampling, asked = scene("sd15").model.model.model_sampling, []
    percent_to_sigma = sampling.percent_to_sigma
    sampling.percent_to_sigma = lambda percent: asked.append(percent) or percent_to_sigma(percent)
    try:
        limits = [percent_to_sigma(percent) for percent in (0.9, 0.2)]
        assert limits[0] < 1.5 < limits[1]
        part = SigmaRange(0.2, 0.9)
        assert all(part.holds(sampling, Sigma()) for _ in range(3))
        assert asked == [0.2, 0.9] and Sigma.read == 3
        assert SigmaRange(0.0, 1.0).holds(sampling, Sigma()) and not SigmaRange(0.5, 0.5).holds(sampling, Sigma())
        assert asked == [0.2, 0.9] and Sigma.read == 3
        for sigma, inside in (
            (limits[0], True),
            (limits[1], True),
            (limits[0] * 0.99, False),
            (limits[1] * 1.01, False),
        ):
            assert part.holds(sampling, torch.tensor([sigma], dtype=torch.float64)) == inside
    finally:
        del sampling.percent_to_sigma


def test_without_text_guidance_the_negative_prompt_does_not_matter(tools, scene):
    scene = scene("sdxl")
    one = tools.guide(scene.guider(text_scale=1.0))
    other = tools.guide(scene.guider(text_scale=1.0, negative=scene.conds["personalized"]))
    assert torch.equal(one, other)
    nearly = tools.guide(scene.guider(text_scale=1.0 + 1e-6))
    assert tools.relative(one, nearly) < 1e-3


def test_two_loras_have_a_scale_each(tools, scene, reference):
    """The first reward term sees the first LoRA alone, the second one the last alone."""
    scene = scene("sdxl")
    style = tools.random_lora(scene.plain, "loha", seed=9)
    both = tools.with_switchable(scene.model, style)
    rewards = [(scene.conds["personalized"], (scene.tensors,), 2.0), (scene.conds["negative"], (style,), 0.7)]
    expected = tools.guide(reference("sdxl", scene, rewards=rewards))
    with tools.CountRows(both) as rows:
        got = tools.guide(scene.guider(both, personalized_2=scene.conds["negative"], reward_scale_2=0.7))
    assert rows == [4, 4, 4]
    assert tools.relative(got, expected) < 1e-5

    expected = tools.guide(
        reference("sdxl", scene, rewards=[(scene.conds["personalized"], (scene.tensors, style), 2.0)])
    )
    assert tools.relative(tools.guide(scene.guider(both)), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_rescaling_works_on_what_the_network_predicts(tools, scene, reference, family):
    """Noise for SD1.5 and SDXL, velocity for SD2.1: written out here from their definitions."""
    scene = scene(family)

    def rescale(guided, base, x, sigma):
        if family == "sd21":
            root = (sigma**2 + 1).sqrt()
            to_prediction = lambda denoised: (x / root**2 - denoised) * root / sigma  # noqa: E731
            to_denoised = lambda velocity: x / root**2 - velocity * sigma / root  # noqa: E731
        else:
            to_prediction = lambda denoised: (x - denoised) / sigma  # noqa: E731
            to_denoised = lambda noise: x - noise * sigma  # noqa: E731
        prediction, target = to_prediction(guided), to_prediction(base)
        factor = target.std((1, 2, 3), keepdim=True) / prediction.std((1, 2, 3), keepdim=True)
        return to_denoised(0.7 * prediction * factor + 0.3 * prediction)

    rewards = [(scene.conds["personalized"], (scene.tensors,), 2.0)]
    start = tools.latent(2)
    expected = tools.guide(reference(family, scene, rewards=rewards, rescale=rescale), start=start, steps=2)
    got = tools.guide(scene.guider(rescale=0.7), start=start, steps=2)
    assert tools.relative(got, expected) < 1e-5
    assert tools.relative(tools.guide(scene.guider(), start=start, steps=2), expected) > 1e-3


def test_short_of_memory_the_rows_run_one_by_one_with_the_same_result(comfy, tools, scene, monkeypatch):
    scene = scene("sdxl")
    together = tools.guide(scene.guider())

    def no_memory(_device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_memory)
    with tools.CountRows(scene.model) as rows:
        apart = tools.guide(scene.guider())
    assert rows == [1] * 9
    assert tools.relative(apart, together) < 1e-4


def area(comfy, conditioning, x, y, width, height):
    return comfy.nodes.ConditioningSetArea().append(conditioning, width, height, x, y, 1.0)[0]


def test_areas_and_masks_keep_the_lora_where_it_belongs(comfy, tools, scene, reference):
    """The host copies a conditioning that has an area into the other lists; the LoRA must not go with it."""
    scene = scene("sd15")
    combine = comfy.nodes.ConditioningCombine().combine
    left = area(comfy, scene.conds["personalized"], 0, 0, 64, 64)
    start = {"samples": torch.zeros(1, 4, 8, 16)}
    mask = torch.zeros(1, 64, 128)
    mask[..., 40:] = 1
    masked = comfy.nodes.ConditioningSetMask().append(scene.conds["personalized"], mask, "default", 0.8)[0]
    for personalized in (combine(left, scene.conds["base"])[0], combine(masked, scene.conds["base"])[0]):
        expected = tools.guide(
            reference("sd15", scene, rewards=[(personalized, (scene.tensors,), 2.0)]), start=start, steps=2
        )
        got = tools.guide(scene.guider(personalized=personalized), start=start, steps=2)
        assert tools.relative(got, expected) < 1e-5
        assert tools.relative(tools.guide(scene.guider(), start=start, steps=2), expected) > 1e-3


def test_a_mask_on_the_latent_is_respected(tools, scene):
    scene = scene("sd15")
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    start = {**tools.latent(), "noise_mask": mask}
    result = tools.guide(scene.guider(), start=start)
    kept, changed = (result - start["samples"])[..., 4:], (result - start["samples"])[..., :4]
    assert kept.abs().max() < 1e-5 < changed.abs().max()


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
@pytest.mark.parametrize("node", ("ControlNetApplyAdvanced", "ControlNetApply"))
def test_a_controlnet_on_the_personalized_prompt_also_holds_for_the_base(
    comfy, tools, scene, control_net, family, node
):
    scene = scene(family)
    control, hint = control_net(scene.plain), torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    names = ("personalized", "base", "negative")
    if node == "ControlNetApplyAdvanced":
        apply = comfy.nodes.ControlNetApplyAdvanced().apply_controlnet
        personalized, negative = apply(
            scene.conds["personalized"], scene.conds["negative"], control, hint, 0.8, 0.0, 1.0
        )
        given = {"personalized": personalized, "negative": negative}
        shared = personalized[0][1]["control"]
        explicit = {name: [[c[0], {**c[1], "control": shared}] for c in scene.conds[name]] for name in names}
    else:
        apply = comfy.nodes.ControlNetApply().apply_controlnet
        given = {"personalized": apply(scene.conds["personalized"], control, hint, 0.8)[0]}
        shared = given["personalized"][0][1]["control"]
        explicit = {name: [[c[0], {**c[1], "control": shared}] for c in scene.conds[name]] for name in names}
    with tools.CountRows(scene.model) as rows:
        got = tools.guide(scene.guider(**given))
    assert rows == [3, 3, 3]
    assert torch.equal(got, tools.guide(scene.guider(**explicit)))
    assert tools.relative(tools.guide(scene.guider()), got) > 1e-3
    without_reward = tools.guide(scene.guider(**given, reward_scale=0.0))
    plain = tools.ksample(scene.plain, explicit["base"], explicit["negative"], cfg=5.0)
    assert torch.equal(without_reward, plain)


def test_a_controlnet_of_the_base_prompt_is_kept(scene):
    from comfyui_personalize.nodes.guiding import share_control

    own, other = [[None, {"control": "own"}]], [[None, {"control": "other", "control_apply_to_uncond": True}]]
    bare = [[None, {}], [None, {"area": 1}]]
    assert share_control(other, own) is own
    assert share_control(bare, bare) is bare
    assert [options for _, options in share_control(other, bare)] == [
        {"control": "other", "control_apply_to_uncond": True},
        {"control": "other", "control_apply_to_uncond": True, "area": 1},
    ]
    assert bare == [[None, {}], [None, {"area": 1}]]


def patched_by_other_nodes(comfy, model):
    """Patches of the host's own nodes: attention and block patches, CFG rules before, in place of and after ours."""
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_model_advanced import RescaleCFG
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    def run(node, *args):
        function = getattr(node, "execute", None) or getattr(node(), getattr(node, "FUNCTION", ""), None)
        result = function(*args)
        return result[0] if isinstance(result, tuple) else result.args[0]

    yield run(FreeU_V2, model, 1.1, 1.2, 0.9, 0.2)
    yield run(RescaleCFG, model, 0.7)
    yield run(PerturbedAttentionGuidance, model, 2.0)
    before = model.clone()
    before.set_model_sampler_pre_cfg_function(lambda args: [out * 0.9 for out in args["conds_out"]])
    yield before


def test_other_model_patches_compose(comfy, tools, scene):
    """Without reward everything is bit-equal to the same patches under the host's KSampler."""
    scene = scene("sd15")
    pairs = zip(patched_by_other_nodes(comfy, scene.model), patched_by_other_nodes(comfy, scene.plain))
    for ours, plain in pairs:
        expected = tools.ksample(plain, scene.conds["base"], scene.conds["negative"], cfg=5.0)
        assert torch.equal(tools.guide(scene.guider(ours, reward_scale=0.0)), expected)
        rewarded = tools.guide(scene.guider(ours))
        assert torch.isfinite(rewarded).all() and tools.relative(rewarded, expected) > 1e-3


def test_sampler_custom_advanced_and_the_simple_node_agree_and_leave_the_model_alone(comfy, tools, scene):
    from comfy_extras.nodes_custom_sampler import Noise_RandomNoise, SamplerCustomAdvanced

    from comfyui_personalize.nodes.dco import KSamplerRewardGuidance, RewardGuiderNode

    scene = scene("sdxl")
    plain = tools.ksample(scene.plain, scene.conds["base"], scene.conds["negative"])
    mask = torch.zeros(1, 64, 64)
    mask[..., :40] = 1
    start = {**tools.latent(2), "noise_mask": mask, "batch_index": [3, 1]}
    range_ = {"rescale": 0.3, "start_percent": 0.0, "end_percent": 0.8}
    simple = KSamplerRewardGuidance.execute(
        model=scene.model, seed=7, steps=3, cfg=5.0, reward_scale=2.0, sampler_name="dpmpp_2m", scheduler="karras",
        latent_image=start, denoise=0.6, **scene.conds, **range_,
    ).args[0]  # fmt: skip
    guider = RewardGuiderNode.execute(
        model=scene.model, text_scale=5.0, reward_scale=2.0, **scene.conds, **range_
    ).args[0]
    ks = comfy.samplers.KSampler(scene.model, 3, torch.device("cpu"), "dpmpp_2m", "karras", 0.6)
    run = getattr(SamplerCustomAdvanced, "execute", None) or SamplerCustomAdvanced().sample
    result = run(Noise_RandomNoise(7), guider, comfy.samplers.sampler_object("dpmpp_2m"), ks.sigmas, start)
    advanced = (result if isinstance(result, tuple) else result.args)[0]
    assert torch.equal(simple["samples"], advanced["samples"])
    assert simple["batch_index"] == [3, 1] and simple["noise_mask"] is mask
    assert torch.equal(tools.ksample(scene.plain, scene.conds["base"], scene.conds["negative"]), plain)


def test_the_simple_node_without_reward_is_the_hosts_ksampler(comfy, tools, scene):
    from comfyui_personalize.nodes.dco import KSamplerRewardGuidance

    scene = scene("sd21")
    start = {**tools.latent(2, 9, 7), "batch_index": [0, 4]}
    (expected,) = comfy.nodes.KSampler().sample(
        scene.plain, 11, 3, 6.0, "euler_ancestral", "normal", scene.conds["base"], scene.conds["negative"], start, 0.7
    )
    got = KSamplerRewardGuidance.execute(
        model=scene.model, seed=11, steps=3, cfg=6.0, reward_scale=0.0, sampler_name="euler_ancestral",
        scheduler="normal", latent_image=start, denoise=0.7, rescale=0.0, start_percent=0.0, end_percent=1.0,
        **scene.conds,
    ).args[0]  # fmt: skip
    assert torch.equal(got["samples"], expected["samples"])
    empty = KSamplerRewardGuidance.execute(
        model=scene.model, seed=11, steps=3, cfg=6.0, reward_scale=2.0, sampler_name="euler", scheduler="normal",
        latent_image=start, denoise=0.0, rescale=0.0, start_percent=0.0, end_percent=1.0, **scene.conds,
    ).args[0]  # fmt: skip
    assert torch.equal(empty["samples"], start["samples"])


def test_nothing_grows_over_twenty_runs(tools, scene):
    scene = scene("sd15")

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        tools.guide(scene.guider(), steps=2)
    count, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        tools.guide(scene.guider(), steps=2, seed=seed)
    assert tensors() == count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 * 1024  # KiB


def test_a_second_prompt_needs_a_second_lora(scene):
    from comfyui_personalize.models.errors import ConfigError

    scene = scene("sd15")
    with pytest.raises(ConfigError, match="needs two LoRAs to tell apart, but this model carries 1"):
        scene.guider(personalized_2=scene.conds["base"])


def test_a_model_without_a_switchable_lora_is_pointed_out(scene, caplog):
    scene = scene("sd15")
    with caplog.at_level(logging.WARNING):
        scene.guider(scene.plain)
    assert "load the LoRA with Load DCO LoRA" in caplog.text
