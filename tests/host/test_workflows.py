"""The shipped workflows run over HTTP on a tiny SDXL: two train, and the others sample with what was trained."""

import json

import numpy as np
import pytest
from safetensors import safe_open


@pytest.fixture(scope="module")
def shipped(load_helper):
    return load_helper("host/shipped_workflows.py")


@pytest.fixture(scope="module")
def run_small(comfy_server, load_helper, shipped):
    """run_small(name) -> (graph, run, pictures of each saving node by its title); once per workflow."""
    done = {}

    def run(name):
        if name not in done:
            with load_helper("host/client.py").Client(comfy_server.url, timeout=300) as client:
                graph = shipped.small(name)
                if name in shipped.TRAININGS:
                    shipped.upload_pictures(client, graph)
                else:
                    for training in shipped.TRAININGS:
                        run(training)
                result = client.run(graph)
                assert result.status == "success", result.error
                savers = shipped.nodes(graph, "SaveImage")
                pictures = {node["_meta"]["title"]: client.images(result, key) for key, node in savers.items()}
                done[name] = graph, result, pictures
        return done[name]

    return run


def test_there_are_trainings_and_samplings(shipped):
    assert shipped.TRAININGS == ["dco_train_style", "dco_train_subject"]
    assert shipped.SAMPLINGS == ["dco_reward_guidance", "dco_subject_in_style"]


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


@pytest.mark.parametrize("name", ("dco_reward_guidance", "dco_subject_in_style"))
def test_a_sampling_makes_a_picture(run_small, shipped, name):
    _, _, pictures = run_small(name)
    ((picture,),) = pictures.values()
    assert picture.size == (shipped.SIDE, shipped.SIDE)
    assert np.asarray(picture.convert("RGB")).std() > 5  # of 255: not one colour


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("dco_reward_guidance", "reward_scale"),
        ("dco_reward_guidance", "text_scale"),
        ("dco_subject_in_style", "reward_scale"),
        ("dco_subject_in_style", "reward_scale_2"),
    ],
)
def test_each_scale_of_the_guidance_is_felt(run_small, shipped, client, name, setting):
    _, _, pictures = run_small(name)
    graph = shipped.small(name)
    for node in graph.values():
        if setting in node["inputs"]:
            node["inputs"][setting] = 0.0
    changed = client.run(graph)
    assert changed.status == "success", changed.error
    ((before,),) = pictures.values()
    (after,) = client.images(changed)
    assert not np.array_equal(np.asarray(before), np.asarray(after))


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


def test_a_workflow_names_every_input_of_our_nodes(client, shipped):
    for name in shipped.NAMES:
        for node in shipped.api(name).values():
            if node["class_type"].startswith("Personalize"):
                known = client.object_info(node["class_type"])["input"]
                assert node["inputs"].keys() <= known["required"].keys() | known.get("optional", {}).keys()
                assert known["required"].keys() <= node["inputs"].keys()
