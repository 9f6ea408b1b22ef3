"""The Perfusion trainer nodes in this process: train, sample what was trained, and be told the same by both UNets."""

import uuid

import pytest
import torch

QUICK = {"steps": 2, "batch_size": 1, "gradient_accumulation": 1, "resolution": 64, "precision": "fp32"}
THINGS = ("red cup", "old cup", "red sky", "old sky")
CAPTIONS = "\n".join(f"a {thing} number {number}" for number in range(12) for thing in THINGS)


@pytest.fixture
def train(comfy, tiny_checkpoint, load_helper):
    """train(name, family, **settings) -> what Train Perfusion gives, on one picture with a mask."""
    from comfyui_personalize.models.tokens import LearnedToken
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_perfusion import TrainPerfusion
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.dataset import Dataset

    files = load_helper("tiny/perfusion.py")
    with torch.inference_mode(False):
        tokens = (LearnedToken("<cup>", "cup"),)
        masks = torch.zeros(1, 40, 48)
        masks[:, 8:32, 8:40] = 0.5
        pictures = _host.image_list([torch.rand(1, 40, 48, 3)])
        dataset = Dataset.from_tensors(pictures, "a <cup>", tokens=tokens, masks=masks)

    def run(name, family="sd15", covariance_name=None, **settings):
        path = comfy.base / "models" / "perfusion_covariances" / f"{family}.safetensors"
        with torch.inference_mode(False):
            files.write_random_covariance(path, family)
        base = open_base(tiny_checkpoint(family), tokenizer=_host.tokenizer_folder())
        node = TrainPerfusion.PREPARE_CLASS_CLONE(None)
        given = {"covariance_name": covariance_name or path.name, "output_name": name, "overwrite": True}
        return node.execute(base=base, dataset=dataset, **given, **QUICK | settings)

    return run


def load_concept(name, beta=0.65):
    from comfyui_personalize.nodes.perfusion_concepts import LoadPerfusionConcept

    return LoadPerfusionConcept.execute(name, beta, 0.15, True).result[0]


@pytest.mark.parametrize("family", ("sd15", "sdxl"))
def test_train_and_sample(comfy, train, load_helper, family):
    from comfyui_personalize.nodes.perfusion import ApplyPerfusion, PerfusionTextEncode

    tools = load_helper("host/sampling.py")
    output = train("a_cup", family, preview_every=2, preview_steps=1)
    name, curve, preview, steps, summary = output.result
    assert (name, steps, "2 steps" in summary) == ("a_cup.safetensors", 2, True)
    assert preview.shape == (1, 64, 128, 3) and curve.ndim == 4
    model, clip, _ = comfy.load(family)
    concepts = load_concept(name)
    edited, taught = ApplyPerfusion.execute(model, clip, concepts).result
    prompts = [PerfusionTextEncode.execute(taught, concepts, "a {1}", lock).result[0] for lock in (False, True)]
    negative = PerfusionTextEncode.execute(taught, concepts, "", False).result[0]
    local, locked = (tools.ksample(edited, prompt, negative, steps=2) for prompt in prompts)
    plain = tools.ksample(model, prompts[0], negative, steps=2)
    assert local.isfinite().all() and tools.relative(local, plain) > 1e-3
    assert locked.isfinite().all()


@pytest.mark.parametrize("family", ("sd15", "sd21", "sdxl"))
@pytest.mark.parametrize("mode", ("paper", "positions"))
def test_a_trained_concept_predicts_the_same_in_both_unets(comfy, train, tiny_checkpoint, load_helper, family, mode):
    from comfyui_personalize.models.perfusion import edit_space
    from comfyui_personalize.nodes.guiding import SigmaRange
    from comfyui_personalize.nodes.rank_one_edits import _TAGS, KEY, attach
    from comfyui_personalize.trainers.base import open_base
    from comfyui_personalize.trainers.conditioning import Conditioning, predict
    from comfyui_personalize.trainers.rank_one_edits import RankOneEdits, cross_projections, project

    (gated,) = load_concept(train("same", family, output_mode=mode, save_precision="fp32", batch_size=2).result[0])
    concept = gated.concept
    generator = torch.Generator().manual_seed(2)
    patcher, _, _ = comfy.load(family)
    unet = open_base(tiny_checkpoint(family)).load_unet()
    width = unet.config.cross_attention_dim
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([700, 37])
    context = torch.randn(2, 77, width, generator=generator) * 0.1 + concept.parts.target_input
    superclass = torch.randn(2, 77, width, generator=generator) * 0.1 + concept.parts.target_input
    pooled = time_ids = vector = None
    if family == "sdxl":
        pooled = torch.randn(2, 128, generator=generator)
        sizes = {"height": 64, "width": 64, "crop_h": 0, "crop_w": 0, "target_height": 64, "target_width": 64}
        vector = torch.cat([patcher.model.encode_adm(pooled_output=row[None], **sizes) for row in pooled])
        time_ids = torch.tensor([list(sizes.values())] * 2, dtype=torch.float32)

    space = edit_space([concept], [gated.beta], [gated.tau])
    modules = cross_projections(unet)
    outputs = {n: [concept.target_output(n, lambda rows, m=m: project(m, rows))] for n, m in modules.items()}
    edits = RankOneEdits(unet, space, outputs)
    model = attach(patcher, [gated], SigmaRange(0.0, 1.0))
    comfy.model_management.load_model_gpu(model)
    inner = model.model.diffusion_model.to(torch.float32)
    plain = inner(noisy, timesteps, context=context, y=vector, transformer_options={})
    for keys in (None, superclass):
        chunk = uuid.uuid4()
        options = {"wrappers": {"diffusion_model": {KEY: model.get_wrappers("diffusion_model", KEY)}}, "uuids": [chunk]}
        options[_TAGS] = {} if keys is None else {(0, chunk): keys}
        host = inner(noisy, timesteps, context=context, y=vector, transformer_options=options)
        edits.superclass = keys
        ours = predict(unet, noisy, timesteps, Conditioning(context, pooled, time_ids))
        assert load_helper("host/sampling.py").relative(host, ours) < 1e-4
        assert load_helper("host/sampling.py").relative(host, plain) > 1e-3


def test_without_a_covariance_nothing_starts(comfy, train):
    from comfyui_personalize.models.errors import ConfigError, FormatError
    from comfyui_personalize.nodes.train_perfusion import NO_FILE, TrainPerfusion

    sentence = TrainPerfusion.validate_inputs(covariance_name=NO_FILE)
    assert "make one with the node Estimate Text Covariance" in sentence
    assert TrainPerfusion.validate_inputs(covariance_name="absent.npy").startswith("there is no covariance named")
    assert TrainPerfusion.validate_inputs(covariance_name=None, output_name="../up") is not True
    with pytest.raises(ConfigError, match="Estimate Text Covariance"):
        TrainPerfusion.execute(None, None, NO_FILE, "name")
    with pytest.raises(FormatError, match="not in the perfusion_covariances folder"):
        TrainPerfusion.execute(None, None, "absent.npy", "name")


@pytest.fixture
def estimate(comfy, tiny_checkpoint):
    """estimate(file, **settings) -> what Estimate Text Covariance gives."""
    from comfyui_personalize.nodes import _host
    from comfyui_personalize.nodes.train_perfusion import EstimateTextCovariance
    from comfyui_personalize.trainers.base import open_base

    base = open_base(tiny_checkpoint("sd15"), tokenizer=_host.tokenizer_folder())

    def run(file="captions.txt", name="estimated", **settings):
        given = {"captions": 0, "batch_size": 8, "precision": "fp32", "save_every": 0, "resume": True}
        node = EstimateTextCovariance.PREPARE_CLASS_CLONE(None)
        return node.execute(base, file, name, overwrite=True, **given | settings)

    return run


def test_a_covariance_is_estimated_and_trained_with(comfy, estimate, train):
    from comfyui_personalize.nodes.train_perfusion import EstimateTextCovariance, TrainPerfusion

    (comfy.base / "input").mkdir(exist_ok=True)
    (comfy.base / "input" / "captions.txt").write_text(CAPTIONS)
    assert EstimateTextCovariance.validate_inputs(captions_file="captions.txt", output_name="x") is True
    name, captions, summary = estimate().result
    assert (name, captions, summary) == ("estimated.safetensors", 48, "covariance of 48 captions")
    assert TrainPerfusion.fingerprint_inputs(covariance_name=name)
    assert train("with_it", covariance_name=name).result[3] == 2


def test_only_text_files_of_the_input_folder_are_read(comfy, estimate):
    from comfyui_personalize.models.errors import DatasetError
    from comfyui_personalize.nodes.train_perfusion import EstimateTextCovariance

    (comfy.base / "secret.txt").write_text(CAPTIONS)
    for name in ("../secret.txt", str(comfy.base / "secret.txt"), "absent.txt", "", ".."):
        with pytest.raises(
            DatasetError, match="is not a text file in ComfyUI's input folder; choose one from the list"
        ):
            estimate(name)
        assert EstimateTextCovariance.fingerprint_inputs(captions_file=name) == ""
        assert "is not a text file" in EstimateTextCovariance.validate_inputs(captions_file=name)


def test_cancel_keeps_the_sum_and_ends_the_prompt(comfy, estimate):
    (comfy.base / "input").mkdir(exist_ok=True)
    (comfy.base / "input" / "captions.txt").write_text(CAPTIONS)
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        estimate(name="cancelled")
    assert not (comfy.base / "models" / "perfusion_covariances" / "cancelled.safetensors").exists()
    assert not comfy.model_management.processing_interrupted()
