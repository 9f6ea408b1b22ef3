"""The loader and sampling nodes as the host sees and runs them."""

import json

import pytest
import torch
from safetensors.torch import save_file

WIDGET = {"INT", "FLOAT", "STRING", "COMBO"}


@pytest.fixture
def tools(comfy, load_helper):
    return load_helper("host/sampling.py")


@pytest.fixture
def loras(comfy):
    """The host's folder for LoRAs, and a way to put a file there."""
    folder = comfy.base / "models" / "loras"

    def save(name, tensors, metadata=None):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
        return name

    return save


def encode(comfy, clip, text):
    return comfy.nodes.CLIPTextEncode().encode(clip, text)[0]


def load(model, clip, name, *, strength_model=1.0, strength_clip=1.0, tokens=""):
    from comfyui_personalize.nodes.load_dco import LoadDCOLoRA

    LoadDCOLoRA.fingerprint_inputs(
        model=None, clip=None, lora_name=name, strength_model=1.0, strength_clip=1.0, tokens=""
    )
    return LoadDCOLoRA.execute(model, name, strength_model, strength_clip, tokens, clip).args


def text_lora(clip, prefixes):
    """A random LoRA on the first layer of every text encoder, under kohya's names."""
    from comfy.lora import model_lora_keys_clip

    weights, generator, tensors = clip.cond_stage_model.state_dict(), torch.Generator().manual_seed(0), {}
    for name, key in sorted(model_lora_keys_clip(clip.cond_stage_model, {}).items()):
        if name.startswith(prefixes) and "layers_0_" in name:
            out, inputs = weights[key].shape
            tensors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, generator=generator) * 0.2
            tensors[f"{name}.lora_up.weight"] = torch.randn(out, 2, generator=generator) * 0.2
    assert tensors
    return tensors


@pytest.mark.parametrize("family", ("sd15", "sd21", "sdxl"))
def test_the_loader_node_equals_the_stock_loader_on_model_and_clip(comfy, tools, loras, family):
    model, clip, _ = comfy.load(family)
    text = text_lora(clip, ("lora_te1_", "lora_te2_") if family == "sdxl" else ("lora_te_",))
    name = loras(f"{family}.safetensors", tools.random_lora(model, gain=0.3) | text)
    ours, our_clip, tokens = load(model, clip, name, strength_model=0.8, strength_clip=0.6)
    stock, stock_clip = comfy.nodes.LoraLoader().load_lora(model, clip, name, 0.8, 0.6)
    assert tokens == ""
    (embeds, extra), (expected, expected_extra) = (
        encode(comfy, our_clip, "a dog")[0],
        encode(comfy, stock_clip, "a dog")[0],
    )
    assert torch.equal(embeds, expected) and torch.equal(extra["pooled_output"], expected_extra["pooled_output"])
    assert not torch.allclose(embeds, encode(comfy, clip, "a dog")[0][0])
    conds = encode(comfy, clip, "a dog"), encode(comfy, clip, "")
    expected = tools.ksample(stock, *conds, steps=2, cfg=4.0)
    assert tools.relative(tools.ksample(ours, *conds, steps=2, cfg=4.0), expected) < 1e-5


def test_the_authors_output_folder_loads_with_its_tokens(comfy, tools, loras):
    from comfy.utils import unet_to_diffusers

    from comfyui_personalize.nodes.learned_tokens import encoder_widths
    from comfyui_personalize.nodes.switchable_lora import chain

    model, clip, _ = comfy.load("sdxl")
    lora = {}
    for diffusers, sgm in unet_to_diffusers(model.model.model_config.unet_config).items():
        module = diffusers.removesuffix(".weight")
        if module.rsplit("attn", 1)[-1] in {f"{n}.to_{p}" for n in (1, 2) for p in ("q", "k", "v", "out.0")}:
            weight = model.model.diffusion_model.get_parameter(sgm)
            lora[f"unet.{module}.lora.down.weight"] = torch.randn(2, weight.shape[1]) * 0.1
            lora[f"unet.{module}.lora.up.weight"] = torch.randn(weight.shape[0], 2) * 0.1
    name = loras("my dog/pytorch_lora_weights.safetensors", lora)
    rows = {key: torch.randn(2, width) for key, width in encoder_widths(clip).items()}
    loras("my dog/learned_embeds.safetensors", rows)

    personalized, taught, tokens = load(model, clip, name)
    assert tokens == "<my-dog>"
    assert len(chain(personalized)[0].layers) == len(lora) // 2
    assert load(model, clip, name, tokens="dog, <hat>")[2] == "<dog>, <hat>"
    before = encode(comfy, clip, "a <my-dog>")[0][0]
    assert not torch.allclose(encode(comfy, taught, "a <my-dog>")[0][0], before)
    _, none, tokens = load(model, None, name)
    assert none is None and tokens == "<my-dog>"


def test_our_own_files_bring_their_tokens_bundled_or_from_the_embeddings_folder(comfy, tools, loras):
    from comfyui_personalize.nodes.load_dco import LoadDCOLoRA

    model, clip, _ = comfy.load("sd15")
    lora, rows = tools.random_lora(model), torch.randn(2, 64)
    metadata = {"personalize.tokens": json.dumps([{"trigger": "<dog>", "initializer": "dog", "rows": 2}])}
    bundled = loras("bundled.safetensors", lora | {"bundle_emb.dog.clip_l": rows}, metadata)
    apart = loras("apart.safetensors", lora, metadata)
    folder = comfy.base / "models" / "embeddings"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"clip_l": rows}, folder / "apart.safetensors", metadata)
    save_file({"clip_l": rows}, folder / "stranger.safetensors")
    stranger = loras("stranger.safetensors", lora)

    results = [load(model, clip, name) for name in (bundled, apart)]
    assert [tokens for _, _, tokens in results] == ["<dog>", "<dog>"]
    first, second = (encode(comfy, taught, "a <dog>")[0][0] for _, taught, _ in results)
    assert torch.equal(first, second)
    assert load(model, clip, stranger)[2] == ""
    version = LoadDCOLoRA.fingerprint_inputs(lora_name=apart)
    save_file({"clip_l": rows * 2}, folder / "apart.safetensors", metadata)
    assert LoadDCOLoRA.fingerprint_inputs(lora_name=apart) != version


def test_tokens_that_cannot_be_found_are_missed_where_they_would_be_taught(comfy, tools, loras):
    from comfyui_personalize.models.errors import ConfigError, FormatError

    model, clip, _ = comfy.load("sd15")
    metadata = {"personalize.tokens": json.dumps([{"trigger": "<dog>", "initializer": "dog", "rows": 1}])}
    alone = loras("alone.safetensors", tools.random_lora(model), metadata)
    missing = "alone.safetensors was trained with <dog>; put alone.safetensors into the embeddings folder"
    for names in ("", "<cat>"):
        with pytest.raises(FormatError, match=missing):
            load(model, clip, alone, tokens=names)
    assert load(model, None, alone)[1:] == (None, "")
    plain = loras("plain.safetensors", tools.random_lora(model))
    with pytest.raises(ConfigError, match="plain.safetensors carries no learned tokens, but <dog> should name some"):
        load(model, clip, plain, tokens="dog")


def test_an_export_that_fails_tells_no_folder_of_the_host(comfy, tools, loras, tmp_path, monkeypatch):
    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.nodes.export_lora import LAYOUTS, ExportLoRA

    name = loras("exported_from.safetensors", tools.random_lora(comfy.load("sd15")[0]))
    elsewhere = tmp_path / "library" / "Lora"
    for target in (comfy.base / "models" / "loras", elsewhere):
        monkeypatch.setattr(comfy.folder_paths, "get_folder_paths", lambda kind, target=target: [str(target)])
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FormatError, match=f"fresh.safetensors could not be saved in {target.name} ") as refusal:
            ExportLoRA.execute(name, LAYOUTS[0], "sd15", "fresh")
        assert str(comfy.base) not in str(refusal.value) and str(tmp_path) not in str(refusal.value)


def test_chained_loaders_keep_their_order_and_strengths(comfy, tools, loras):
    from comfyui_personalize.nodes.switchable_lora import chain

    model, clip, _ = comfy.load("sd15")
    names = [loras(f"chain/{index}.safetensors", tools.random_lora(model, seed=index)) for index in range(2)]
    one, clip_one, _ = load(model, clip, names[0], strength_model=0.5)
    two, _, _ = load(one, clip_one, names[1], strength_model=0.7)
    assert [(lora.name, lora.strength) for lora in chain(two)] == [("0.safetensors", 0.5), ("1.safetensors", 0.7)]
    assert len(chain(one)) == 1 and not chain(model)


def test_bad_files_are_refused_in_one_sentence(comfy, tools, loras):
    from comfyui_personalize.models.errors import FormatError, IncompatibleModelError
    from comfyui_personalize.nodes.switchable_lora import chain

    model, clip, _ = comfy.load("sd15")
    folder = comfy.base / "models" / "loras" / "bad"
    name = loras("bad/other.safetensors", tools.random_lora(comfy.load("sdxl")[0], every=1))
    whole = (folder / "other.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "page.safetensors").write_text("<html>not found</html>")
    loras("bad/empty.safetensors", {"bundle_emb.dog.clip_l": torch.zeros(1, 64)})
    loras("bad/magnitude.safetensors", {"unet.x.lora_magnitude_vector": torch.zeros(4)})
    for name, error, text in (
        ("bad/other.safetensors", IncompatibleModelError, "fit this SD1.5 model"),
        ("bad/truncated.safetensors", FormatError, "truncated"),
        ("bad/page.safetensors", FormatError, "not a safetensors file"),
        ("bad/empty.safetensors", IncompatibleModelError, "no LoRA of this model"),
        ("bad/magnitude.safetensors", FormatError, "DoRA in peft's layout"),
        ("bad/gone.safetensors", FormatError, "not in the loras folder any more"),
    ):
        with pytest.raises(error, match=text) as refusal:
            load(model, clip, name)
        assert "\n" not in str(refusal.value)
    assert not chain(model)


def test_every_input_is_explained_and_bounded(comfy):
    """The ids, and for every widget a tooltip, a default and bounds: saved workflows depend on them."""
    from comfyui_personalize.nodes import NODES

    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
    assert len(schemas) == len(NODES)
    for node_id, schema in schemas.items():
        assert node_id.startswith("Personalize") and schema.category.startswith("personalize/")
        assert schema.display_name and schema.description
        seen_optional = False
        for entry in schema.inputs:
            assert entry.tooltip, f"{node_id}.{entry.id} has no tooltip"
            assert not (seen_optional and not entry.optional), f"{node_id}: {entry.id} stands behind an optional input"
            seen_optional = seen_optional or entry.optional
            if entry.get_io_type() in {"INT", "FLOAT"}:
                assert entry.min <= entry.default <= entry.max and entry.default is not None


EXPECTED_WIDGETS = {
    "PersonalizeLoadDCOLoRA": ["lora_name", "strength_model", "strength_clip", "tokens"],
    "PersonalizeLoadLearnedTokens": ["embedding_name", "trigger"],
    "PersonalizeRewardGuider": [
        "text_scale", "reward_scale", "rescale", "start_percent", "end_percent", "reward_scale_2",
    ],
    "PersonalizeKSamplerRewardGuidance": [
        "seed", "steps", "cfg", "reward_scale", "sampler_name", "scheduler", "denoise", "rescale", "start_percent",
        "end_percent", "reward_scale_2",
    ],
}  # fmt: skip


def test_widgets_keep_their_places(comfy):
    """Workflows store widget values by position: new ones may only follow these."""
    from comfyui_personalize.nodes import NODES

    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in NODES}
    for node_id, expected in EXPECTED_WIDGETS.items():
        widgets = [entry.id for entry in schemas[node_id].inputs if entry.get_io_type() in WIDGET]
        assert widgets[: len(expected)] == expected
