"""Perfusion Balance in the host: what it tries, what it chooses, how it is cancelled, and what is refused."""

import gc
import shutil

import pytest
import torch

JUDGE = "tiny_clip"


@pytest.fixture(scope="module")
def judge(host_modules, load_helper):
    """The host's folder for scoring with a CLIP with random weights."""
    root = host_modules.base / "models" / "scoring"
    load_helper("tiny/judges.py").write_clip(root / JUDGE)
    yield root / JUDGE
    shutil.rmtree(root)


@pytest.fixture
def scene(comfy, load_helper):
    """Model, CLIP and VAE with two concepts."""
    from types import SimpleNamespace

    from comfyui_personalize.nodes.rank_one_edits import GatedConcept

    make_concept = load_helper("host/concepts.py").make_concept
    model, clip, vae = comfy.load("sd15")
    words = (("<cup>", "cup"), ("<bear>", "bear"))
    concepts = tuple(
        GatedConcept(make_concept(model, clip, *pair, seed=seed), 0.65, 0.15) for seed, pair in enumerate(words)
    )
    return SimpleNamespace(model=model, clip=clip, vae=vae, concepts=concepts)


@pytest.fixture
def run(scene, judge):
    """run(**inputs) -> concepts, beta, tau, contact sheet, table, plot."""
    from comfyui_personalize.nodes.perfusion_balance import PerfusionBalance

    def execute(**changed):
        inputs = {
            "model": scene.model,
            "clip": scene.clip,
            "vae": scene.vae,
            "concepts": scene.concepts,
            "references": torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(0)),
            "latent_image": {"samples": torch.zeros(1, 4, 8, 8)},
            "number": 1,
            "prompts": "a {1}\na {1} on a {2}",
            "negative": "",
            "betas": "0.5, 2",
            "taus": "0.15",
            "clip_folder": JUDGE,
            "seed": 3,
            "steps": 2,
            "cfg": 3.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "global_locking": True,
        } | changed
        return PerfusionBalance.PREPARE_CLASS_CLONE(None).execute(**inputs).args

    return execute


def test_the_choice_is_the_tables_and_the_gate_is_set(run, scene):
    concepts, beta, tau, sheet, table, plot = run()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["0.5", "0.15"], ["2", "0.15"]]
    assert rows[0][2:4] != rows[1][2:4], "both gates make the same pictures"
    (chosen,) = [row for row in rows if row[-1] == "chosen"]
    assert (f"{beta:g}", f"{tau:g}") == tuple(chosen[:2])
    assert [(gated.beta, gated.tau) for gated in concepts] == [(beta, tau), (0.65, 0.15)]
    assert concepts[0].concept is scene.concepts[0].concept
    assert sheet.shape[0] == plot.shape[0] == 1 and sheet.std() > 0.05 and plot.std() > 0.01


@pytest.mark.parametrize("negative", ["", "a {2}, <cup>"], ids=["without", "with"])
def test_pictures_are_those_of_the_sampler_from_the_same_noise(comfy, run, scene, monkeypatch, negative):
    from comfyui_personalize.nodes import perfusion_balance
    from comfyui_personalize.nodes.gate_sweep import with_gate
    from comfyui_personalize.nodes.perfusion import KSamplerMultiConceptLocking

    seen, decoded = [], perfusion_balance.decoded
    monkeypatch.setattr(perfusion_balance, "decoded", lambda vae, rows: seen.append(rows) or decoded(vae, rows))
    start = {"samples": torch.zeros(2, 4, 8, 8)}
    run(betas="0.5", latent_image=start, prompts="a {1} on a {2}", negative=negative)
    (found,) = seen
    gated = with_gate(scene.concepts, 1, (0.5, 0.15))
    (expected,) = KSamplerMultiConceptLocking.execute(
        scene.model, scene.clip, gated, "a {1} on a {2}", negative, 3, 2, 3.0, "euler", "normal", start, 1.0, True
    ).args
    assert torch.equal(found, expected["samples"])


def test_the_judge_is_asked_in_plain_words(run, monkeypatch):
    from comfyui_personalize.nodes import gate_sweep

    asked, sitting = [], gate_sweep.Sitting
    monkeypatch.setattr(
        gate_sweep,
        "Sitting",
        lambda made, real, prompts, advance: asked.append(prompts) or sitting(made, real, prompts, advance),
    )
    run(prompts="a {1}\n\n<BEAR> with <cup>")
    assert asked == [["a cup", "bear with cup"] * 2]


def test_a_cancel_takes_effect_after_the_step_under_way(comfy, run, monkeypatch):
    from comfyui_personalize.nodes import _host

    reported, report = [], _host.HostProgress.report

    def cancelling(self, step, total, *rest):
        report(self, step, total, *rest)
        reported.append((step, total))
        if step == 3:
            comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(_host.HostProgress, "report", cancelling)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(steps=4)
    assert reported == [(step, 16) for step in (1, 2, 3)]


def test_a_chain_of_training_pictures_is_as_good_as_a_batch(run):
    from comfyui_personalize.trainers.dataset import Example
    from comfyui_personalize.trainers.pictures import Picture

    references = torch.rand(2, 40, 64, 3)
    chain = tuple(Example(Picture.from_tensor(one, "one"), "", "") for one in references)
    assert run(references=None, pictures=chain, betas="0.5")[4] == run(references=references, betas="0.5")[4]


def test_nothing_stays_on_the_model(run, scene):
    run(betas="0.5")
    gc.collect()
    modules = list(scene.model.model.diffusion_model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "CLIPModel"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"betas": "0.5, 9"}, "betas: 9 is out of range; it goes from -2 to 4"),
        ({"taus": "0"}, "taus: 0 is out of range; it goes from 0.001 to 2"),
        ({"taus": ""}, "taus: '' is no number"),
        ({"prompts": "a {1}\na cup"}, "the prompt 'a cup' does not show the concept; write {1} or <cup>"),
        ({"prompts": " \n"}, "found no prompt"),
        ({"prompts": "a {1} on {3}"}, "asks for concept {3}, 2 are loaded"),
        ({"negative": "{3}"}, "asks for concept {3}, 2 are loaded"),
        ({"number": 3}, "concept 3 is to be tried out, 2 are loaded"),
        ({"clip_folder": "none"}, "there is nothing to score with"),
        ({"clip_folder": "gone"}, "there is no folder 'gone'"),
        ({"references": None}, "the concept's own pictures come from no place"),
        ({"pictures": ()}, "come from two places"),
        ({"references": None, "pictures": ()}, "there are no pictures to compare with"),
        ({"references": torch.zeros(0, 9, 9, 3)}, "there are no pictures to compare with"),
        ({"references": torch.full((1, 9, 9, 3), torch.nan)}, "reference 1 contains NaN"),
        ({"latent_image": {"samples": torch.zeros(200, 4, 8, 8)}}, "make 800 pictures, at most 512"),
        ({"latent_image": {"samples": torch.zeros(0, 4, 8, 8)}}, "make 0 pictures"),
    ],
)
def test_what_cannot_be_tried_is_refused_before_sampling(run, monkeypatch, changed, message):
    from comfyui_personalize.models.errors import PersonalizeError
    from comfyui_personalize.nodes import gate_sweep

    monkeypatch.setattr(gate_sweep, "attach", None)  # sampling would call it
    with pytest.raises(PersonalizeError) as raised:
        run(**changed)
    assert message in str(raised.value)


def test_a_concept_without_superclass_cannot_be_asked_for(run, scene):
    from dataclasses import replace

    from comfyui_personalize.models.errors import ConfigError

    one = scene.concepts[0]
    nameless = replace(one, concept=replace(one.concept, superclass=""))
    with pytest.raises(ConfigError, match="does not say which word it stands in for"):
        run(concepts=(nameless,), prompts="a {1}")


def test_unknown_choices_are_refused_before_queueing(judge):
    from comfyui_personalize.nodes.perfusion_balance import PerfusionBalance

    good = {"betas": "0.5", "taus": "0.1", "clip_folder": JUDGE, "sampler_name": "euler", "scheduler": "normal"}
    check = PerfusionBalance.validate_inputs
    assert check(**good) is True and check() is True
    for name, value, part in (
        ("betas", "nan", "betas: nan is out of range"),
        ("taus", "x", "taus: 'x' is no number"),
        ("clip_folder", "none", "choose a clip_folder"),
        ("clip_folder", "gone", "'gone'"),
        ("sampler_name", "gone", "'gone'"),
        ("scheduler", "gone", "'gone'"),
    ):
        assert part in check(**good | {name: value})
