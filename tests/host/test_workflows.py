"""The shipped workflows run over HTTP on a tiny SDXL: some train or save, and others sample with what they left."""

import copy
import itertools
import json

import numpy as np
import pytest
from safetensors import safe_open

LOOKAHEAD = [
    "lookahead_face_to_portrait",
    "lookahead_fast_portrait",
    "lookahead_few_steps",
    "lookahead_preview_guidance",
    "lookahead_saved_identity",
    "lookahead_style_grid",
]
ENCODER = ["lookahead_generate_identities", "lookahead_validate_encoder"]
PERFUSION = ["perfusion_global_locking", "perfusion_two_concepts"]
ROWS = {"lookahead_style_grid": 4, "perfusion_global_locking": 2}
"""How many pictures a workflow makes, where it is not one."""


@pytest.fixture(scope="module")
def shipped(load_helper):
    return load_helper("host/shipped_workflows.py")


@pytest.fixture(scope="module")
def run_small(comfy_server, load_helper, shipped):
    """run_small(name) -> (graph, run, pictures of each saving node by its title); once per workflow."""
    shipped.write_models(comfy_server.base / "models", load_helper("tiny/lookahead.py"))
    shipped.write_concepts(comfy_server.base / "models", load_helper("tiny/perfusion.py"))
    shipped.write_networks(comfy_server.base / "models", load_helper("tiny/judges.py"))
    done = {}

    def run(name):
        if name not in done:
            for first in shipped.FIRST.get(name, ()):
                run(first)
            with load_helper("host/client.py").Client(comfy_server.url, timeout=300) as client:
                graph = shipped.small(name)
                shipped.upload_pictures(client, graph)
                result = client.run(graph)
                assert result.status == "success", result.error
                savers = {key: node for key, node in graph.items() if node["class_type"] == "SaveImage"}
                pictures = {node["_meta"]["title"]: client.images(result, key) for key, node in savers.items()}
                done[name] = graph, result, pictures
        return done[name]

    return run


def test_there_are_trainings_and_samplings(shipped):
    assert shipped.TRAININGS == [
        "dco_train_style",
        "dco_train_subject",
        "dvar_train_custom_diffusion",
        "dvar_train_dco",
        "dvar_train_dreambooth",
        "dvar_train_textual_inversion",
        "lookahead_train_encoder",
        "perfusion_train_concept",
        "perfusion_train_with_masks",
    ]
    samplings = [
        "dco_reward_guidance",
        "dco_subject_in_style",
        "dvar_compare_rules",
        *LOOKAHEAD,
        *ENCODER,
        "perfusion_balance",
        *PERFUSION,
    ]
    assert shipped.SAMPLINGS == sorted(samplings)


@pytest.mark.parametrize("name", ("dco_train_subject", "dco_train_style"))
def test_a_training_shows_and_saves_what_it_learned(run_small, shipped, comfy_server, name):
    graph, run, pictures = run_small(name)
    assert [len(pictures[title]) for title in ("Loss curve", "Preview picture")] == [1, 1]
    assert pictures["Preview picture"][0].size == (shipped.SIDE, shipped.SIDE)
    assert run.previews

    ((key, trainer),) = shipped.nodes(graph, "PersonalizeTrainDCO").items()
    assert run.progress(key)[-1] == (2, 2)
    settings = trainer["inputs"]
    models, runs = comfy_server.base / "models", comfy_server.base / "output" / "personalize"
    log = (runs / settings["output_name"] / "log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    assert len(losses) == settings["steps"] and np.isfinite(losses).all()

    with safe_open(models / "loras" / f"{settings['output_name']}.safetensors", framework="pt") as file:
        assert any("lora" in key for key in file.keys())
        stored = json.loads(file.metadata()["personalize.config"])
    assert {key: stored[key] for key in ("rank", "offset_noise", "beta")} == {
        key: settings[key] for key in ("rank", "offset_noise", "beta")
    }
    assert (models / "embeddings" / f"{settings['output_name']}.safetensors").exists() == (name == "dco_train_subject")


def test_a_word_is_shown_and_saved(run_small, shipped, comfy_server):
    graph, run, pictures = run_small("dvar_train_textual_inversion")
    assert [len(pictures[title]) for title in ("Loss curve", "Preview picture")] == [1, 1]
    ((key, _),) = shipped.nodes(graph, "PersonalizeTrainTextualInversion").items()
    assert run.previews and run.progress(key)[-1][0] >= 1
    path = comfy_server.base / "models" / "embeddings" / "my_word.safetensors"
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["personalize.tokens"])[0]["rows"] == 2
    assert not (comfy_server.base / "models" / "loras" / "my_word.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "kind", "folder", "file"),
    [
        ("dvar_train_dreambooth", "DreamBoothLoRA", "loras", "my_dreambooth"),
        ("dvar_train_custom_diffusion", "CustomDiffusion", "custom_diffusion", "my_custom_dog"),
        ("dvar_train_dco", "DCO", "loras", "my_dco_dog"),
    ],
)
def test_dvar_watches_a_training(run_small, shipped, comfy_server, name, kind, folder, file):
    graph, run, pictures = run_small(name)
    assert [len(pictures[title]) for title in ("Loss curve", "Preview picture")] == [1, 1]
    assert pictures["Loss curve"][0].size == (768, 720)  # with the normalized variance below
    ((key, _),) = shipped.nodes(graph, f"PersonalizeTrain{kind}").items()
    assert run.previews and run.progress(key)[-1][0] >= 1
    assert all(
        (comfy_server.base / "models" / kept / f"{file}.safetensors").is_file() for kept in (folder, "embeddings")
    )
    log = (comfy_server.base / "output" / "personalize" / file / "log.jsonl").read_text().splitlines()
    assert "dvar" in json.loads(log[0])


def test_three_rules_are_compared_in_one_plot(run_small, shipped):
    graph, run, pictures = run_small("dvar_compare_rules")
    assert [picture.size for picture in pictures.pop("Loss curves")] == [(768, 432)]
    assert len(pictures) == 3 and all(len(previews) == 1 for previews in pictures.values())
    ((key, _),) = shipped.nodes(graph, "PersonalizeCompareLossCurves").items()
    (table,) = run.outputs[key]["text"]
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    assert rows == [["| my_dog_short", "2"], ["| my_dog_dvar", "2"], ["| my_dog_clip", "2"]]


@pytest.mark.parametrize(
    ("name", "file"),
    [("perfusion_train_concept", "my_teddy"), ("perfusion_train_with_masks", "my_masked_teddy")],
)
def test_a_concept_is_shown_and_saved(run_small, shipped, comfy_server, name, file):
    graph, run, pictures = run_small(name)
    assert len(pictures["Loss curve"]) == 1
    assert pictures["Preview picture"][0].size == (2 * shipped.SIDE, shipped.SIDE)  # local and global key locking
    ((key, _),) = shipped.nodes(graph, "PersonalizeTrainPerfusion").items()
    assert run.previews and run.progress(key)[-1] == (2, 2)
    path = comfy_server.base / "models" / "perfusion_concepts" / f"{file}.safetensors"
    assert path.stat().st_size < 100_000
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["personalize.tokens"])[0]["trigger"] == "<teddy>"


def test_masks_are_shown_for_every_picture(run_small, shipped, client):
    graph, run, _ = run_small("perfusion_train_with_masks")
    (shown,) = shipped.nodes(graph, "PreviewImage")
    masks = client.images(run, shown)
    assert len(masks) == len(shipped.nodes(graph, "PersonalizeTrainingPicture"))
    assert all(np.asarray(mask.convert("L")).std() > 1 for mask in masks)


def test_a_balance_is_shown(run_small, shipped):
    graph, run, pictures = run_small("perfusion_balance")
    sheet, front = pictures["Contact sheet"][0], pictures["Front"][0]
    assert sheet.height > 2 * shipped.SIDE and sheet.width > 8 * shipped.SIDE  # two gates, four prompts twice
    assert front.size == (768, 512)
    ((key, _),) = shipped.nodes(graph, "PersonalizePerfusionBalance").items()
    assert run.progress(key)


def test_a_set_of_people_is_made_and_goes_on(run_small, shipped, comfy_server, client):
    graph, run, _ = copy.deepcopy(run_small("lookahead_generate_identities"))
    folder = comfy_server.base / "input" / "my_people"
    ((saver, _),) = shipped.nodes(graph, "PersonalizeSaveIdentitySet").items()
    assert len(run.outputs[saver]["images"]) == 4 and run.outputs[saver]["text"] == [
        "my_people: 4 new, 4 pictures of 1 people"
    ]
    listed = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.jpg"))
    assert set(listed.values()) == {"Marta Quillon"}
    assert all(name.startswith("Marta Quillon/vanilla/") for name in listed)
    again = client.run(graph)
    assert again.status == "success" and again.outputs[saver]["text"] == ["my_people: 4 new, 8 pictures of 1 people"]

    ((planner, _),) = shipped.nodes(graph, "PersonalizeIdentityPrompts").items()
    one = {"names_file": "(none)", "names": "Marta Quillon", "vanilla_prompts_file": "(none)", "stylized_pictures": 0}
    graph[planner]["inputs"] |= one | {"vanilla_prompts": "A photo of conceptname"}
    nothing_left = client.run(graph)
    assert nothing_left.status == "success" and saver not in nothing_left.outputs


def test_an_encoder_is_trained_on_the_set_and_measured(run_small, shipped, comfy_server):
    graph, run, pictures = run_small("lookahead_train_encoder")
    ((key, _),) = shipped.nodes(graph, "PersonalizeTrainLookaheadEncoder").items()
    assert [len(pictures[title]) for title in ("Loss curve", "Preview picture")] == [1, 1]
    assert run.previews and run.progress(key)[-1] == (2, 2)
    assert (comfy_server.base / "models" / "lookahead_encoders" / "my_encoder.safetensors").is_file()

    graph, run, pictures = run_small("lookahead_validate_encoder")
    assert len(pictures["Pictures"]) == 4 and len(pictures["Scores"]) == 1
    ((key, _),) = shipped.nodes(graph, "PersonalizePersonalizationScores").items()
    (table,) = run.outputs[key]["text"]
    assert "CLIP-I" in table and "- face: choose a face_folder" in table


@pytest.mark.parametrize("name", ("dco_reward_guidance", "dco_subject_in_style", *LOOKAHEAD, *PERFUSION))
def test_a_sampling_makes_its_pictures(run_small, shipped, name):
    _, _, made = run_small(name)
    (pictures,) = made.values()
    assert len(pictures) == ROWS.get(name, 1)
    for picture in pictures:
        assert picture.size == (shipped.SIDE, shipped.SIDE)
        assert np.asarray(picture.convert("RGB")).std() > 5  # of 255: not one colour
    for one, other in itertools.pairwise(pictures):
        assert not np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("dco_reward_guidance", "reward_scale", 0.0),
        ("dco_reward_guidance", "text_scale", 0.0),
        ("dco_subject_in_style", "reward_scale", 0.0),
        ("dco_subject_in_style", "reward_scale_2", 0.0),
        ("lookahead_face_to_portrait", "text_scale", 0.0),
        ("lookahead_face_to_portrait", "full_scale", 0.0),
        ("lookahead_face_to_portrait", "identity_scale", 0.0),
        ("lookahead_face_to_portrait", "adapter_scale", 0.0),
        ("lookahead_face_to_portrait", "sharing_strength", 0.0),
        ("lookahead_face_to_portrait", "b2", 1.0),  # FreeU
        ("lookahead_fast_portrait", "text_scale", 1.0),
        ("lookahead_fast_portrait", "adapter_scale", 0.0),
        ("lookahead_few_steps", "adapter_scale", 0.0),
        ("lookahead_few_steps", "sharing_strength", 0.0),
        ("lookahead_few_steps", "strength_model", 0.0),
        ("lookahead_style_grid", "identity_scale", 0.0),
        ("lookahead_style_grid", "reference_noise", "each picture's own"),
        ("lookahead_saved_identity", "end_percent", 0.3),
        ("lookahead_saved_identity", "identity_scale", 0.0),
        ("lookahead_preview_guidance", "scale", 0.0),
        ("lookahead_preview_guidance", "lora_name", "none"),
        ("perfusion_global_locking", "beta", 2.0),
        ("perfusion_global_locking", "cfg", 3.0),
        ("perfusion_two_concepts", "beta", 2.0),
        ("perfusion_two_concepts", "global_locking", False),
    ],
)
def test_each_setting_is_felt(run_small, shipped, client, name, setting, value):
    _, _, made = run_small(name)
    graph = shipped.small(name)
    holders = [node["inputs"] for node in graph.values() if setting in node["inputs"]]
    assert holders and all(inputs[setting] != value for inputs in holders)
    for inputs in holders:
        inputs[setting] = value
    changed = client.run(graph)
    assert changed.status == "success", changed.error
    (before,) = made.values()
    (saver,) = shipped.nodes(graph, "SaveImage")
    # The first picture of a grid has the same noise either way.
    assert not np.array_equal(np.asarray(before[-1]), np.asarray(client.images(changed, saver)[-1]))


def test_the_shipped_settings_are_the_authors(shipped):
    """Steps, rates, rank, beta, noise and scales as in the README of kyungmnlee/dco."""
    (subject,) = shipped.nodes(shipped.api("dco_train_subject"), "PersonalizeTrainDCO").values()
    (style,) = shipped.nodes(shipped.api("dco_train_style"), "PersonalizeTrainDCO").values()
    expected = {"steps": 2000, "learning_rate": 5e-5, "text_learning_rate": 5e-6, "beta": 1000.0, "rank": 32}
    assert expected.items() <= subject["inputs"].items()
    assert {"steps": 1000, "learning_rate": 5e-5, "rank": 64, "offset_noise": 0.1}.items() <= style["inputs"].items()
    assert not subject["inputs"]["offset_noise"] and not subject["inputs"]["train_text_encoder"]
    assert subject["inputs"]["resolution"] == style["inputs"]["resolution"] == 0  # the base's own: 1024 for SDXL
    (guider,) = shipped.nodes(shipped.api("dco_reward_guidance"), "PersonalizeRewardGuider").values()
    assert (guider["inputs"]["text_scale"], guider["inputs"]["reward_scale"]) == (7.5, 3.0)


def test_the_shipped_settings_of_lookahead_are_the_authors(shipped):
    """As in infer.py of OrLichter/lcm-lookahead; of FreeU what acts there: b1 and s1 never do."""
    sharing = {"mode": "attention sharing", "text_scale": 3.0, "full_scale": 2.0, "identity_scale": 2.0}
    everywhere = {"adapter_scale": 1.0, "sharing_strength": 1.0, "start_percent": 0.0, "rescale": 0.0}
    expected = {
        "lookahead_face_to_portrait": sharing,
        "lookahead_fast_portrait": {"mode": "adapter only", "text_scale": 5.0},
        "lookahead_few_steps": {"few_step": True, "sampler_name": "lcm"},
        "lookahead_saved_identity": sharing,
        "lookahead_style_grid": sharing,
    }
    for name, values in expected.items():
        graph = shipped.api(name)
        (sampling,) = [node["inputs"] for node in graph.values() if "adapter_scale" in node["inputs"]]
        assert (values | everywhere).items() <= sampling.items()
        (sampler,) = [node["inputs"]["sampler_name"] for node in graph.values() if "sampler_name" in node["inputs"]]
        assert sampler == ("lcm" if sampling["few_step"] else "dpmpp_2m")
        assert shipped.nodes(graph, "ConditioningZeroOut").keys() == {sampling["negative"][0]}
        if sampling["mode"] == "attention sharing":
            assert graph[sampling["encoder_prompt"][0]]["inputs"]["text"] == "a photo of a face"
    (freeu,) = shipped.nodes(shipped.api("lookahead_face_to_portrait"), "FreeU").values()
    assert {"b1": 1.0, "b2": 1.1, "s1": 1.0, "s2": 0.2}.items() <= freeu["inputs"].items()


def test_the_shipped_settings_of_perfusion_are_the_authors(shipped):
    """As in configs/perfusion_custom.yaml and the README of the authors; they sample with 50 DDIM steps."""
    names = ("perfusion_train_concept", "perfusion_train_with_masks")
    trainers = [shipped.nodes(shipped.api(name), "PersonalizeTrainPerfusion").values() for name in names]
    expected = {"steps": 400, "learning_rate": 0.03, "embedding_learning_rate": 0.006, "batch_size": 4}
    expected |= {"gradient_accumulation": 4, "beta": 0.75, "tau": 0.1, "ema_decay": 0.99, "weight_decay": 0.01}
    assert all(expected.items() <= trainer["inputs"].items() for (trainer,) in trainers)
    (sampler,) = shipped.nodes(shipped.api("perfusion_two_concepts"), "PersonalizeKSamplerMultiConceptLocking").values()
    assert {"steps": 50, "cfg": 6.0, "sampler_name": "ddim"}.items() <= sampler["inputs"].items()


def test_the_shipped_settings_of_dvar_are_the_authors(shipped):
    """As in the README of yandex-research/DVAR; DCO takes the numbers for LoRAs."""
    steps = {"dreambooth": ("DreamBoothLoRA", 1000), "custom_diffusion": ("CustomDiffusion", 500)}
    for name, (kind, most) in (steps | {"dco": ("DCO", 2000)}).items():
        graph = shipped.api(f"dvar_train_{name}")
        (rule,) = shipped.nodes(graph, "PersonalizeStopDVAR").values()
        (trainer,) = shipped.nodes(graph, f"PersonalizeTrain{kind}").values()
        assert rule["inputs"]["preset"] == ("custom diffusion" if name == "custom_diffusion" else "dreambooth")
        assert trainer["inputs"]["steps"] == most and rule["inputs"]["code"] == "11111"
    trainers = list(shipped.nodes(shipped.api("dvar_compare_rules"), "PersonalizeTrainDreamBoothLoRA").values())
    assert len(trainers) == 3
    for own in ("output_name", "stopping"):
        assert len({str(trainer["inputs"].pop(own)) for trainer in trainers}) == 3
    assert trainers[0]["inputs"] == trainers[1]["inputs"] == trainers[2]["inputs"]


def test_a_workflow_names_every_input_of_our_nodes(client, shipped):
    for name in shipped.NAMES:
        for node in shipped.api(name).values():
            if node["class_type"].startswith("Personalize"):
                known = client.object_info(node["class_type"])["input"]
                assert node["inputs"].keys() <= known["required"].keys() | known.get("optional", {}).keys()
                assert known["required"].keys() <= node["inputs"].keys()
