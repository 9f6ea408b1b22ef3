"""A switchable LoRA equals the host's own loader where it is on, and leaves no trace where it is off."""

import copy
import gc
import logging
import resource

import pytest
import torch

FAMILIES = ("sd15", "sd21", "sdxl")
KINDS = (
    "lora", "tucker", "dora", "loha", "lokr", "oft", "boft", "glora", "diff", "set", "norm", "norm_diff",
    "lora_and_bias",
)  # fmt: skip


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


def encode(comfy, clip, text):
    return comfy.nodes.CLIPTextEncode().encode(clip, text)[0]


@pytest.fixture
def scene(comfy, tools):
    """scene(family) -> model, positive, negative."""

    def make(family):
        model, clip, _ = comfy.load(family)
        return model, encode(comfy, clip, "a photo of a dog"), encode(comfy, clip, "blurry")

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", (1.0, -0.6))
def test_plain_ksampler_equals_the_stock_loader(tools, scene, family, strength):
    model, positive, negative = scene(family)
    tensors = tools.random_lora(model, every=1, gain=0.3)
    few = {"steps": 2, "cfg": 4.0}  # rounding errors of a random model grow with both
    plain = tools.ksample(model, positive, negative, **few)
    expected = tools.ksample(tools.with_stock_loader(model, tensors, strength), positive, negative, **few)
    got = tools.ksample(tools.with_switchable(model, tensors, strength), positive, negative, **few)
    assert tools.relative(plain, expected) > 1e-2
    assert tools.relative(got, expected) < 1e-5
    assert torch.equal(tools.ksample(model, positive, negative, **few), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_lora_gives_the_stock_loaders_prediction(tools, scene, kind, caplog):
    """One forward of the UNet, so that the sampler cannot amplify or hide a difference."""
    model, positive, _ = scene("sdxl")
    tensors = tools.random_lora(model, kind)
    assert tensors
    plain = tools.ksample(model, positive, positive, cfg=1.0, steps=1)
    with caplog.at_level(logging.ERROR):
        expected = tools.ksample(tools.with_stock_loader(model, tensors, 0.7), positive, positive, cfg=1.0, steps=1)
        got = tools.ksample(tools.with_switchable(model, tensors, 0.7), positive, positive, cfg=1.0, steps=1)
    assert not caplog.messages
    assert tools.relative(plain, expected) > 1e-3
    assert tools.relative(got, expected) < 1e-5


@pytest.mark.parametrize("layout", ("kohya", "generic", "diffusers", "authors", "peft", "peft_default", "unprefixed"))
def test_every_layout_of_names_is_understood(tools, scene, layout):
    import comfy.utils

    model, positive, negative = scene("sdxl")
    names = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for source, target in comfy.utils.unet_to_diffusers(model.model.model_config.unet_config).items()
        if target.endswith(".weight") and "attn" in target and ".to_" in target
    }
    kohya, renamed = {}, {}
    for index, (sgm, diffusers) in enumerate(sorted(names.items())):
        module = model.model.diffusion_model.get_submodule(sgm)
        generator = torch.Generator().manual_seed(index)
        down = torch.randn(4, module.in_features, generator=generator) * 0.1
        up = torch.randn(module.out_features, 4, generator=generator) * 0.1
        kohya |= {f"{tools.stem(sgm)}.lora_down.weight": down, f"{tools.stem(sgm)}.lora_up.weight": up}
        old = diffusers.replace(".to_", ".processor.to_").removesuffix(".0")
        down_name, up_name = {
            "kohya": (f"lora_unet_{diffusers.replace('.', '_')}.lora_down.weight",) * 2,
            "generic": (f"diffusion_model.{sgm}.lora_down.weight",) * 2,
            "diffusers": (f"unet.{old}_lora.down.weight",) * 2,
            "authors": (f"unet.{diffusers}.lora.down.weight",) * 2,
            "peft": (f"unet.{diffusers}.lora_A.weight", f"unet.{diffusers}.lora_B.weight"),
            "peft_default": (f"unet.{diffusers}.lora_A.default.weight", f"unet.{diffusers}.lora_B.default.weight"),
            "unprefixed": (f"{diffusers}.lora_A.weight", f"{diffusers}.lora_B.weight"),
        }[layout]
        renamed |= {up_name.replace("down.weight", "up.weight"): up, down_name: down}
    assert len(renamed) == len(kohya)
    expected = tools.ksample(tools.with_stock_loader(model, kohya), positive, negative)
    assert tools.relative(tools.ksample(model, positive, negative), expected) > 1e-2
    assert tools.relative(tools.ksample(tools.with_switchable(model, renamed), positive, negative), expected) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tag_switches_the_lora_for_the_rows_of_its_conditioning_alone(comfy, tools, scene, family):
    """Rows on and off in one forward equal separate forwards of the patched and the plain model."""
    import comfy.samplers

    from comfyui_personalize.nodes.switchable_lora import TAG, chain, switched

    model, positive, negative = scene(family)
    tensors = tools.random_lora(model)
    lora = tools.with_switchable(model, tensors)

    class Record(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            conds = [self.conds[name] for name in ("a", "b", "c")]
            self.predictions = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, model_options)
            return self.predictions[0]

    def record(model, tags):
        guider = Record(model)
        entries = {"a": positive, "b": negative, "c": positive}
        guider.inner_set_conds({k: [[c[0], {**c[1], **tag}] for c in entries[k]] for k, tag in zip("abc", tags)})
        with tools.CountRows(model) as rows:
            tools.guide(guider, steps=1, start=tools.latent(2, 9, 7))
        return guider.predictions, rows

    off, half = {TAG: {}}, {TAG: switched(chain(lora), 0.5)}
    mixed, rows = record(lora, ({}, off, half))
    assert rows == [6]
    (patched, *_), _ = record(tools.with_stock_loader(model, tensors), ({}, {}, {}))
    (_, plain, _), _ = record(model, ({}, {}, {}))
    (_, _, halved), _ = record(tools.with_stock_loader(model, tensors, 0.5), ({}, {}, {}))
    for got, expected in zip(mixed, (patched, plain, halved)):
        assert tools.relative(got, expected) < 1e-5
    assert tools.relative(patched, plain) > 1e-3


def test_two_loras_compose_and_are_switched_separately(tools, scene):
    from comfyui_personalize.nodes.switchable_lora import TAG, chain, switched

    model, positive, negative = scene("sdxl")
    first, second = tools.random_lora(model, seed=1), tools.random_lora(model, "loha", seed=2)
    both = tools.with_switchable(tools.with_switchable(model, first, 0.8), second, 0.5)
    stock_both = tools.with_stock_loader(tools.with_stock_loader(model, first, 0.8), second, 0.5)
    expected = tools.ksample(stock_both, positive, negative)
    assert tools.relative(tools.ksample(both, positive, negative), expected) < 1e-5

    only = [[[c[0], {**c[1], TAG: switched(chain(both)[1:])}] for c in cond] for cond in (positive, negative)]
    expected = tools.ksample(tools.with_stock_loader(model, second, 0.5), positive, negative)
    assert tools.relative(tools.ksample(both, *only), expected) < 1e-5


def test_stacks_on_loras_that_the_host_patched_in(tools, scene):
    model, positive, negative = scene("sd15")
    first, second = tools.random_lora(model, seed=1), tools.random_lora(model, "dora", seed=2)
    expected = tools.ksample(tools.with_stock_loader(tools.with_stock_loader(model, first), second), positive, negative)
    got = tools.ksample(tools.with_switchable(tools.with_stock_loader(model, first), second), positive, negative)
    assert tools.relative(got, expected) < 1e-5


def test_clones_do_not_see_each_others_loras_and_the_model_stays_untouched(tools, scene):
    model, positive, negative = scene("sdxl")
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    plain = tools.ksample(model, positive, negative)
    one, two = (tools.with_switchable(model, tools.random_lora(model, seed=seed)) for seed in (1, 2))
    first = tools.ksample(one, positive, negative)
    second = tools.ksample(two, positive, negative)
    assert torch.equal(tools.ksample(one.clone(), positive, negative), first)
    assert torch.equal(tools.ksample(model, positive, negative), plain)
    assert not torch.allclose(first, second)
    after = model.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.model.modules())


def test_hooks_are_removed_when_sampling_fails(tools, scene, monkeypatch):
    model, positive, negative = scene("sd15")
    lora = tools.with_switchable(model, tools.random_lora(model))
    unet = model.model.diffusion_model
    monkeypatch.setattr(unet.middle_block[0], "_forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        tools.ksample(lora, positive, negative)
    assert not any(module._forward_hooks for module in unet.modules())


@pytest.mark.parametrize("kind", ("lora", "loha", "dora"))
def test_low_vram_gives_the_same_result(comfy, tools, scene, kind):
    """Half of the weights stay behind and are patched while computing, ours and those of the host's LoRA."""
    model, positive, negative = scene("sd15")
    model = tools.with_stock_loader(model, tools.random_lora(model, seed=1))
    lora = tools.with_switchable(model, tools.random_lora(model, kind, seed=2))
    expected = tools.ksample(lora, positive, negative)
    comfy.model_management.unload_all_models()
    lora.load(lora.load_device, lowvram_model_memory=lora.model_size() // 2)
    try:
        assert model.model.model_lowvram
        from comfyui_personalize.nodes.switchable_lora import weight_in_force

        patched = [m for m in model.model.modules() if getattr(m, "weight_function", None)]
        assert patched
        module = patched[0]
        assert not torch.equal(weight_in_force(module, "weight", torch.device("cpu")), module.weight.float())
    finally:
        lora.unpatch_model(lora.offload_device)
    loader = comfy.model_management.load_models_gpu

    def load_half(models, **kwargs):
        loader(models, **kwargs)
        lora.partially_unload(lora.offload_device, lora.model_size() // 2)

    comfy.model_management.load_models_gpu = load_half
    try:
        got = tools.ksample(lora, positive, negative)
        assert model.model.model_lowvram
    finally:
        comfy.model_management.load_models_gpu = loader
        comfy.model_management.unload_all_models()
    assert tools.relative(got, expected) < 1e-5


@pytest.mark.parametrize("kind", ("lora", "loha"))
def test_short_of_memory_nothing_is_kept_and_the_result_is_the_same(comfy, tools, scene, kind, monkeypatch):
    from comfyui_personalize.nodes.switchable_lora import RunCache

    model, positive, negative = scene("sd15")
    lora = tools.with_switchable(model, tools.random_lora(model, kind))
    few = {"steps": 2, "cfg": 4.0}  # the host runs the rows one by one, which rounds otherwise
    expected = tools.ksample(lora, positive, negative, **few)
    kept = []
    get = RunCache.get

    def watch(self, *args):
        made = get(self, *args)
        kept.append(len(self._entries))
        return made

    def no_memory(_device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    monkeypatch.setattr(RunCache, "get", watch)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_memory)
    assert tools.relative(tools.ksample(lora, positive, negative, **few), expected) < 1e-5
    assert kept and not any(kept)


def test_memory_is_asked_for_once_a_run_and_shared_out(comfy, monkeypatch):
    from comfyui_personalize.nodes.switchable_lora import RunCache

    asked, made, device = [], [], torch.device("cpu")
    monkeypatch.setattr(comfy.model_management, "minimum_inference_memory", lambda: 10)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: asked.append(device) or 110)
    cache = RunCache()
    for _forward in range(2):
        for key, size in (("a", 40), ("b", 40), ("c", 40), ("d", 10)):
            assert cache.get(key, lambda key=key: made.append(key) or key, lambda _, size=size: size, device) == key
    assert asked == [device]
    assert made == ["a", "b", "c", "d", "c"]  # c did not fit and was made again; d did


def test_modules_are_looked_up_once_a_run_and_for_every_copy_of_the_unet(comfy, tools, scene, monkeypatch):
    model, positive, negative = scene("sd15")
    lora = tools.with_switchable(model, tools.random_lora(model))
    unet, found = model.model.diffusion_model, []
    get = type(unet).get_submodule
    monkeypatch.setattr(type(unet), "get_submodule", lambda self, name: found.append(name) or get(self, name))
    tools.ksample(lora, positive, negative, steps=3)
    from comfyui_personalize.nodes.switchable_lora import RunCache, chain

    adapter = chain(lora)[0]
    assert found == list(adapter.layers)
    monkeypatch.undo()
    cache, copied = RunCache(), copy.deepcopy(unet)
    assert all(module is unet.get_submodule(n) for n, module in zip(adapter.layers, cache.modules(adapter, unet)))
    assert all(module is copied.get_submodule(n) for n, module in zip(adapter.layers, cache.modules(adapter, copied)))


@pytest.mark.parametrize("kind", ("lora", "loha"))
def test_nothing_grows_over_twenty_runs(tools, scene, kind):
    model, positive, negative = scene("sd15")
    lora = tools.with_switchable(model, tools.random_lora(model, kind))

    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(3):
        tools.ksample(lora, positive, negative, steps=2)
    count, peak = tensors(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(20):
        tools.ksample(lora.clone(), positive, negative, steps=2, seed=seed)
    assert tensors() == count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 32 * 1024  # KiB


def test_strength_zero_changes_nothing(tools, scene):
    model, positive, negative = scene("sd15")
    lora = tools.with_switchable(model, tools.random_lora(model), 0.0)
    assert torch.equal(tools.ksample(lora, positive, negative), tools.ksample(model, positive, negative))


@pytest.mark.parametrize(("made_for", "used_with"), [("sd15", "sdxl"), ("sdxl", "sd15"), ("sd15", "sd21")])
def test_a_lora_of_another_family_is_refused_by_name(comfy, tools, made_for, used_with):
    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.lora_layers import match_lora

    tensors = tools.random_lora(comfy.load(made_for)[0], every=1)
    label = {"sd15": "SD1.5", "sd21": "SD2.1", "sdxl": "SDXL"}
    base = {"sd15": "sd_v1-5", "sdxl": "sdxl_base_v1-0"}[made_for]
    with pytest.raises(IncompatibleModelError) as refusal:
        match_lora("cat.safetensors", tensors, {"ss_base_model_version": base}, comfy.load(used_with)[0])
    assert "cat.safetensors looks like a LoRA for " + label[made_for] in str(refusal.value)
    assert f"this {label[used_with]} model" in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "Flux"),
        ("diffusion_model.joint_blocks.0.x_block.attn.qkv.lora_A.weight", "SD3"),
        ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", "Wan"),
    ],
)
def test_families_that_are_not_ours_are_named_by_their_keys(comfy, key, family):
    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.lora_layers import match_lora

    up = key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")
    tensors = {key: torch.zeros(4, 64), up: torch.zeros(64, 4)}
    with pytest.raises(IncompatibleModelError, match=f"LoRA for {family}: 0 of 1 layers fit this SDXL model"):
        match_lora("x.safetensors", tensors, {}, comfy.load("sdxl")[0])


def test_one_layer_of_another_shape_refuses_the_file(comfy, tools):
    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.lora_layers import match_lora

    model = comfy.load("sd15")[0]
    for kind in ("lora", "loha", "diff", "set"):
        tensors = tools.random_lora(model, kind)
        key = next(iter(tensors))
        tensors[key] = torch.cat([tensors[key], tensors[key]], dim=-1)
        with pytest.raises(IncompatibleModelError, match="does not fit"):
            match_lora("x.safetensors", tensors, {}, model)


@pytest.mark.parametrize(
    ("ending", "tensor"),
    [
        ("lora_down.weight", torch.zeros(0, 64)),
        ("lora_down.weight", torch.tensor(1.0)),
        ("lora_up.weight", torch.zeros(64)),
        ("alpha", torch.ones(3)),
    ],
)
def test_a_damaged_layer_refuses_the_file(comfy, tools, ending, tensor):
    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.nodes.lora_layers import match_lora

    model, clip, _ = comfy.load("sd15")
    for stem in ("lora_te_text_model_encoder_layers_0_mlp_fc1", None):
        tensors = tools.random_lora(model)
        stem = stem or next(iter(tensors)).split(".")[0]
        tensors |= {f"{stem}.lora_down.weight": torch.ones(2, 64), f"{stem}.lora_up.weight": torch.ones(256, 2)}
        with pytest.raises(FormatError, match=f"x.safetensors: {stem}.{ending} is .*damaged"):
            match_lora("x.safetensors", tensors | {f"{stem}.{ending}": tensor}, {}, model, clip)


@pytest.mark.parametrize("kind", ("loha", "lokr", "glora"))
@pytest.mark.parametrize("damage", (torch.tensor(1.0), torch.zeros(0), torch.zeros(0, 64)))
def test_a_damaged_layer_of_another_kind_refuses_the_file(comfy, tools, kind, damage):
    from comfyui_personalize.models.errors import PersonalizeError
    from comfyui_personalize.nodes.lora_layers import match_lora

    model = comfy.load("sd15")[0]
    tensors = tools.random_lora(model, kind)
    for key in list(tensors)[:4]:
        if not key.endswith(".alpha"):
            with pytest.raises(PersonalizeError):
                match_lora("x.safetensors", tensors | {key: damage}, {}, model)


def test_text_encoder_layers_without_a_clip_are_left_out_with_a_warning(comfy, tools, caplog):
    from comfyui_personalize.nodes.lora_layers import match_lora

    model, clip, _ = comfy.load("sd15")
    text = "lora_te_text_model_encoder_layers_{}_mlp_fc1"
    tensors = tools.random_lora(model)
    for layer in (0, 30):  # the tiny encoder has three layers
        tensors[f"{text.format(layer)}.lora_down.weight"] = torch.ones(2, 64)
        tensors[f"{text.format(layer)}.lora_up.weight"] = torch.ones(256, 2)
    assert list(match_lora("x.safetensors", tensors, {}, model).text) == []
    assert not caplog.messages
    matched = match_lora("x.safetensors", tensors, {}, model, clip)
    assert list(matched.text) == ["clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"]
    assert "1 text encoder layers" in caplog.text

    from comfyui_personalize.models.errors import IncompatibleModelError

    text_only = {key: value for key, value in tensors.items() if key.startswith("lora_te_")}
    assert match_lora("x.safetensors", text_only, {}, model, clip).unet == {}
    with pytest.raises(IncompatibleModelError, match="connect a CLIP"):
        match_lora("x.safetensors", text_only, {}, model)


def test_models_without_a_unet_are_refused():
    from types import SimpleNamespace

    from comfyui_personalize.models.errors import IncompatibleModelError
    from comfyui_personalize.nodes.switchable_lora import require_unet

    with pytest.raises(IncompatibleModelError, match="Linear"):
        require_unet(SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))))


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.bfloat16, 0.05), (torch.float8_e4m3fn, 1e-4)))
@pytest.mark.parametrize("kind", ("lora", "dora", "loha"))
def test_weights_stored_in_fewer_bits_get_the_whole_change(
    comfy, tools, tiny_checkpoint, scene, kind, dtype, tolerance
):
    """Like the same rounded weights patched in float32; the stock loader would round the sum once more."""
    _, positive, _ = scene("sd15")

    def load(**options):
        return comfy.sd.load_checkpoint_guess_config(
            str(tiny_checkpoint("sd15")), output_clip=False, model_options=options
        )[0]

    rounded, stored = load(dtype=torch.float32), load(dtype=dtype)
    assert stored.model_dtype() == dtype
    for parameter in rounded.model.diffusion_model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    tensors = tools.random_lora(rounded, kind)
    expected = tools.ksample(tools.with_stock_loader(rounded, tensors), positive, positive, cfg=1.0, steps=1)
    got = tools.ksample(tools.with_switchable(stored, tensors), positive, positive, cfg=1.0, steps=1)
    assert tools.relative(got, expected) < tolerance
    assert tools.relative(tools.ksample(stored, positive, positive, cfg=1.0, steps=1), expected) > 3 * tolerance
