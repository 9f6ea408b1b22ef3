"""The face encoder's trainer node in this process: train, load the file, and be told the same by both UNets."""

import json
import uuid

import pytest
import torch
from PIL import Image

QUICK = {
    "steps": 2, "batch_size": 1, "lookahead_batch_size": 1, "resolution": 64, "precision": "fp32", "crop": "center",
    "learning_rate": 1e-3, "adapter_learning_rate": 1e-3, "save_precision": "fp32", "gradient_checkpointing": False,
    "checkpoint_every": 0, "evaluate_every": 0, "preview_every": 0,
}  # fmt: skip
CHOSEN = {
    "encoder_name": "start.safetensors", "clip_vision_name": "tiny.safetensors", "lcm_lora_name": "lcm.safetensors",
    "preview_vae_name": "(none)", "face_network": "(none)", "face_folder": "(none)", "people_folder": "people",
    "prompt_in_filename": True, "placeholder": "face", "prompt": "a photo of a face",
    "only_vanilla_references": False, "crop_heads": False, "identity_weight": 0.0, "image_weight": 0.1,
}  # fmt: skip
PICTURES = {f"ann/A_photo_of_conceptname_{number}.png": "ann" for number in range(3)}


@pytest.fixture
def people(comfy):
    """The folder of people inside the host's input folder."""
    folder = comfy.base / "input" / "people"
    for name in PICTURES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((72, 64), 60).convert("RGB").save(folder / name)
    (folder / "metadata.json").write_text(json.dumps(PICTURES))
    return folder


@pytest.fixture
def train(comfy, people, tiny_checkpoint, load_helper, monkeypatch):
    """train(name, **settings) -> what Train Lookahead Encoder gives, started from a tiny encoder."""
    from safetensors.torch import save_file

    from comfyui_personalize.models.lora import LowRankDelta, kohya_tensors
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_lookahead import TrainLookaheadEncoder
    from comfyui_personalize.trainers import clip_vision
    from comfyui_personalize.trainers.base import open_base

    files, models = load_helper("tiny/lookahead.py"), comfy.base / "models"
    sizes = files.CLIP_VISION_SIZES
    monkeypatch.setitem(clip_vision._HEADS, sizes["hidden_size"], sizes["num_attention_heads"])
    with torch.inference_mode(False):
        files.write_slim(models / "lookahead_encoders" / CHOSEN["encoder_name"], "sdxl")
        files.write_clip_vision(models / "clip_vision" / CHOSEN["clip_vision_name"])
        block, width = next(files.blocks("sdxl"))
        deltas = {f"unet.{block}.attn1.to_q": LowRankDelta(torch.randn(2, width), torch.randn(width, 2) * 0.1)}
        (models / "loras").mkdir(parents=True, exist_ok=True)
        save_file(kohya_tensors(deltas, "sdxl"), models / "loras" / CHOSEN["lcm_lora_name"])
    base = open_base(tiny_checkpoint("sdxl"), tokenizer=_host.tokenizer_folder())

    def run(name, **settings):
        node = TrainLookaheadEncoder.PREPARE_CLASS_CLONE(None)
        return node.execute(base=base, output_name=name, overwrite=True, **CHOSEN | QUICK | settings)

    return run


def test_a_trained_encoder_predicts_the_same_in_both_unets(comfy, train, tiny_checkpoint, load_helper):
    from comfyui_personalize.models.lookahead import IdentityTokens
    from comfyui_personalize.models.lookahead.encoder import encoder_tensors
    from comfyui_personalize.models.lookahead.identity import Identity, fingerprint
    from comfyui_personalize.nodes import identity_attention, identity_roles
    from comfyui_personalize.nodes.encoder_fit import encoder_lora
    from comfyui_personalize.nodes.identity import LoadLookaheadEncoder
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.conditioning import Conditioning
    from comfyui_personalize.trainers.lookahead.identity_attention import IdentityAttention

    shown = {"preview_every": 2, "preview_steps": 1, "preview_people": 1, "evaluate_every": 1, "keep": "best"}
    name, curve, preview, steps, summary = train("trained", **shown).result
    assert (name, steps, "best weights from step" in summary) == ("trained.safetensors", 2, True)
    assert preview.shape[2] == 6 * 224 and curve.ndim == 4

    encoder = LoadLookaheadEncoder.execute(name).result[0]
    start = LoadLookaheadEncoder.execute(CHOSEN["encoder_name"]).result[0]
    learned, before = (encoder_tensors(one, torch.float32) for one in (encoder, start))
    assert learned.keys() == before.keys() and not any(torch.equal(learned[key], before[key]) for key in learned)

    generator = torch.Generator().manual_seed(2)
    unet = open_base(tiny_checkpoint("sdxl")).load_unet()
    noisy, reference = torch.randn(2, 1, 4, 8, 8, generator=generator)
    tokens = torch.randn(1, 4, unet.config.cross_attention_dim, generator=generator)
    context = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    pooled, timesteps = torch.randn(1, 128, generator=generator), torch.tensor([437])
    sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
    told = Conditioning(context, pooled, torch.tensor([list(sizes.values())], dtype=torch.float32))
    ours = IdentityAttention(unet, encoder)
    shared = ours.encode(reference, timesteps, told)
    expected = ours.predict(noisy, timesteps, told, adapter=ours.adapter(tokens), reference=shared)
    alone = ours.predict(noisy, timesteps, told)

    patcher, _, _ = comfy.load("sdxl")
    comfy.model_management.load_model_gpu(patcher)
    inner, run = patcher.model.diffusion_model.to(torch.float32), identity_roles.Run()
    vector = patcher.model.encode_adm(pooled_output=pooled, **sizes)
    identity = Identity(IdentityTokens(tokens, None), None, fingerprint(encoder.resampler))
    attention = identity_attention.IdentityAttention(patcher, encoder, identity, adapter_scale=1.0)
    lora = [encoder_lora(patcher, encoder)]

    def call(x, role):
        chunk = uuid.uuid4()
        wrappers = {"diffusion_model": {"lora": lora if role.keep else [], identity_roles.KEY: [attention]}}
        options = {"wrappers": wrappers, "uuids": [chunk], identity_roles.ROLES: {chunk: role}, identity_roles.RUN: run}
        return inner(x, timesteps, context=context, y=vector, transformer_options=options)

    call(reference, identity_roles.Role(keep="face"))
    found = call(noisy, identity_roles.Role(tokens="cond", shared="face"))
    relative = load_helper("host/sampling.py").relative
    assert run.references["face"].keys() == shared.keys()
    for block, pair in shared.items():
        assert all(relative(one, other) < 1e-4 for one, other in zip(run.references["face"][block], pair)), block
    assert relative(found, expected) < 1e-4 and relative(alone, expected) > 1e-3


def test_looking_ahead_without_a_loss_is_refused_by_the_widgets_names(train):
    from comfyui_personalize.models.errors import ConfigError

    with pytest.raises(ConfigError, match="identity_weight and image_weight are both 0.*lookahead_every"):
        train("none", image_weight=0.0, lookahead_every=1)


def test_files_that_change_make_the_node_run_again(comfy, train, people):
    from comfyui_personalize.nodes.train_lookahead import NO_FILE, TrainLookaheadEncoder

    def version(**changes):
        return TrainLookaheadEncoder.fingerprint_inputs(**CHOSEN | {"validation_folder": NO_FILE} | changes)

    first = version()
    assert version() == first != version(validation_folder="people")
    (people / "metadata.json").write_text(json.dumps(PICTURES) + "\n")
    second = version()
    path = comfy.base / "models" / "lookahead_encoders" / CHOSEN["encoder_name"]
    path.touch()
    assert len({first, second, version()}) == 3
    assert version(people_folder="../models") == version(people_folder=None)
    assert TrainLookaheadEncoder.validate_inputs(validation_folder="../models") is not True
    assert TrainLookaheadEncoder.validate_inputs(keep="worst") is not True


def test_a_small_decoder_of_the_hosts_makes_the_preview(comfy, train, tiny_checkpoint, monkeypatch):
    from safetensors.torch import load_file, save_file

    from comfyui_personalize.models.errors import FormatError
    from comfyui_personalize.nodes.train_lookahead import NO_FILE, TrainLookaheadEncoder
    from comfyui_personalize.trainers.lookahead import loading

    name, weights, prefix = "taesdxl_decoder.safetensors", load_file(tiny_checkpoint("sdxl")), "taesd_decoder."
    decoder = {key.split(prefix)[1]: value for key, value in weights.items() if prefix in key}
    taken, load = [], loading.load_other_vae
    monkeypatch.setattr(loading, "load_other_vae", lambda path, *more: taken.append(path) or load(path, *more))

    def put(kind, *names):
        for one in names:
            (comfy.base / "models" / kind).mkdir(parents=True, exist_ok=True)
            save_file(decoder, comfy.base / "models" / kind / one)

    def offered():
        (widget,) = [one for one in TrainLookaheadEncoder.define_schema().inputs if one.id == "preview_vae_name"]
        return list(widget.options)

    def version():
        return TrainLookaheadEncoder.fingerprint_inputs(**CHOSEN | {"preview_vae_name": name})

    before, versions = offered(), {version()}
    for kind, names in (("vae_approx", (name, "taesdxl_encoder.safetensors", "taesd_decoder.pth")), ("vae", (name,))):
        put(kind, *names)  # of two with one name that in models/vae is taken, as ever
        versions.add(version())
        assert sorted(offered()) == sorted([*before, name]) and offered()[0] == NO_FILE
        assert train("small", preview_vae_name=name).result[3] == 2
        assert taken[-1] == comfy.base / "models" / kind / name
    assert len(versions) == 3
    with pytest.raises(FormatError, match="taesd_decoder.pth is not in the vae folder"):  # of four channels
        train("small", preview_vae_name="taesd_decoder.pth")
    for path in comfy.base.glob("models/vae*/*taesd*"):
        path.unlink()


def test_an_exported_encoder_is_read_again(comfy, train, tiny_checkpoint):
    from comfyui_personalize.models.lookahead.encoder import encoder_tensors
    from comfyui_personalize.nodes.export_lookahead import ExportLookaheadEncoder
    from comfyui_personalize.nodes.identity import LoadLookaheadEncoder
    from comfyui_personalize.trainers.base import open_base

    base, names = open_base(tiny_checkpoint("sdxl")), (CHOSEN["encoder_name"], CHOSEN["clip_vision_name"])
    node = ExportLookaheadEncoder.PREPARE_CLASS_CLONE(None)
    name, report = node.execute(base, *names, "for_the_authors", overwrite=True).result
    assert name == "for_the_authors.pt"
    assert report.startswith(f"saved {name}; ") and "--encoder_lora_rank 4 --kvcopy_lora_rank 4" in report
    found, expected = (encoder_tensors(LoadLookaheadEncoder.execute(one).result[0]) for one in (name, names[0]))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
