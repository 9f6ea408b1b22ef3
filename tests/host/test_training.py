"""Training over HTTP: every way in for pictures, what is shown meanwhile, and what the files are good for."""

import json

import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

FAMILIES = ("sd15", "sd21", "sdxl")
ENCODERS = {"sd15": {"clip_l"}, "sd21": {"clip_h"}, "sdxl": {"clip_l", "clip_g"}}
GROWTH_LIMIT = 64 * 2**20
"""Bytes that three trainings may leave behind; one forgotten SDXL-like model in fp32 is 90 MB."""


@pytest.fixture(scope="module")
def trained(comfy_server, graphs, load_helper):
    """trained(family) -> (graph, run): a training on two chained pictures, its LoRA sampled with in the same graph."""
    runs = {}
    # SD2.1 takes the settings whose constants were made by nodes before it, in the host's inference mode.
    more = {"sd21": {"snr_gamma": 5.0, "offset_noise": 0.1, "gradient_accumulation": 2, "train_text_encoder": True}}

    def train(family):
        if family not in runs:
            with load_helper("host/client.py").Client(comfy_server.url, timeout=graphs.SERVER_TIMEOUT) as client:
                graph = graphs.training(
                    client,
                    f"dog_{family}",
                    family=family,
                    steps=3,
                    preview_every=2,
                    preview_steps=2,
                    **more.get(family, {}),
                )
                graph |= graphs.sampling(family, prompt="a <dog> by the sea", lora=["train", 0], prefix=family)
                for index, name in enumerate(("curve", "preview"), start=1):
                    inputs = {"images": ["train", index], "filename_prefix": name}
                    graph[name] = {"class_type": "SaveImage", "inputs": inputs}
                runs[family] = graph, client.run(graph, workflow={"nodes": [], "version": 0.4})
        graph, run = runs[family]
        assert run.status == "success", run.error
        return graph, run

    return train


def lora_file(server, name):
    return server.base / "models" / "loras" / f"{name}.safetensors"


def embedding_file(server, name):
    return server.base / "models" / "embeddings" / f"{name}.safetensors"


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def succeed(client, graph, **options):
    run = client.run(graph, timeout=300.0, **options)
    assert run.status == "success", run.error
    return run


def pixels(client, run, node="save"):
    (image,) = client.images(run, node)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_shows_what_it_does(trained, client, family):
    _, run = trained(family)
    assert run.progress("train")[-1] == (3, 3)
    assert (2, 2) in run.progress("train")  # two pictures encoded
    lines = [text for node, text in run.texts if node == "train"]
    assert any("encoding" in line for line in lines)
    assert "loss" in lines[-1] and "steps/s" in lines[-1]
    assert max(preview.width for preview in run.previews) == 512  # the trainer's; the sampler's are smaller
    assert "3 steps" in run.outputs["train"]["text"][0]
    assert client.images(run, "train")[0].size == client.images(run, "curve")[0].size
    assert pixels(client, run, "curve").std() > 10
    assert pixels(client, run, "preview").std() > 5
    assert pixels(client, run, "save").std() > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_leaves_files_that_explain_themselves(trained, comfy_server, family):
    trained(family)
    path = lora_file(comfy_server, f"dog_{family}")
    tensors, about = load_file(path), metadata(path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert any(key.endswith("lora_up.weight") and tensor.abs().max() > 0 for key, tensor in tensors.items())
    assert all(key.startswith("lora_") for key in tensors)  # diffusers refuses files with anything else
    assert any(key.startswith("lora_te") for key in tensors) == (family == "sd21")
    assert about["personalize.family"] == family
    assert json.loads(about["personalize.tokens"])[0]["trigger"] == "<dog>"
    assert json.loads(about["personalize.config"])["steps"] == 3
    assert json.loads(about["workflow"])["version"] == 0.4
    assert json.loads(about["prompt"])["train"]["class_type"] == "PersonalizeTrainDCO"
    assert set(load_file(embedding_file(comfy_server, f"dog_{family}"))) == ENCODERS[family]
    run_folder = comfy_server.base / "output" / "personalize" / f"dog_{family}"
    assert sorted(path.name for path in run_folder.iterdir()) == ["log.jsonl", "preview-000002.jpg"]
    assert [json.loads(line)["step"] for line in (run_folder / "log.jsonl").open()] == [1, 2, 3]
    assert not list(comfy_server.base.rglob("*.partial"))


def test_the_files_are_listed_at_once(trained, client):
    trained("sd15")
    for node, widget in (
        ("PersonalizeLoadDCOLoRA", "lora_name"),
        ("PersonalizeExportLoRA", "lora_name"),
        ("PersonalizeLoadLearnedTokens", "embedding_name"),
        ("LoraLoader", "lora_name"),
    ):
        kind, *options = client.object_info(node)["input"]["required"][widget]
        assert "dog_sd15.safetensors" in (kind if isinstance(kind, list) else options[0]["options"])


def test_the_same_workflow_again_is_not_trained_again(client, comfy_server, graphs):
    graph = graphs.training(client, "once", steps=1)
    first = succeed(client, graph)
    written = lora_file(comfy_server, "once").stat().st_mtime_ns
    again = succeed(client, graph)
    assert {"base", "data", "train"} <= again.cached_nodes
    assert again.outputs["train"] == first.outputs["train"]
    assert lora_file(comfy_server, "once").stat().st_mtime_ns == written


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_nodes_take_the_files(trained, client, graphs, family):
    trained(family)
    name = f"dog_{family}.safetensors"

    def sample(**options):
        return pixels(client, succeed(client, graphs.sampling(family, **options)))

    plain = sample(prompt="a dog", prefix="stock")
    stock = sample(prompt="a dog", lora=name, loader="LoraLoader", prefix="stock")
    ours = sample(prompt="a dog", lora=name, prefix="stock")
    assert not np.array_equal(plain, stock)
    assert np.abs(stock.astype(int) - ours).max() <= 2  # of 255: the same LoRA, in weights and beside them
    with_stock_embedding = sample(prompt=f"a embedding:dog_{family}", prefix="stock")
    assert not np.array_equal(plain, with_stock_embedding)
    assert not np.array_equal(sample(prompt="a <dog>", lora=name), sample(prompt="a <dog>", prefix="without"))


def test_a_lora_goes_to_diffusers_and_back(trained, client, comfy_server):
    trained("sdxl")

    def export(source, layout, name):
        inputs = {"lora_name": source, "layout": layout, "family": "auto", "output_name": name, "overwrite": True}
        return {"1": {"class_type": "PersonalizeExportLoRA", "inputs": inputs}}

    kohya, diffusers = client.object_info("PersonalizeExportLoRA")["input"]["required"]["layout"][1]["options"]
    succeed(client, export("dog_sdxl.safetensors", diffusers, "as_diffusers"))
    exported = load_file(lora_file(comfy_server, "as_diffusers"))
    assert all(key.startswith("unet.") for key in exported)
    succeed(client, export("as_diffusers.safetensors", kohya, "and_back"))
    original, back = (load_file(lora_file(comfy_server, name)) for name in ("dog_sdxl", "and_back"))
    assert original.keys() == back.keys()
    assert all(original[key].equal(back[key]) for key in original)
    assert metadata(lora_file(comfy_server, "and_back"))["personalize.family"] == "sdxl"


def test_a_folder_with_text_files_and_class_pictures(client, comfy_server, graphs):
    root = comfy_server.base / "input"
    graphs.fill_folder(root / "sidecars", base_caption="an ordinary photo {}")
    graphs.fill_folder(root / "class_dogs", count=2, caption="a photo of a dog")
    dataset = {"folder": "sidecars", "class_folder": "class_dogs"}
    graph = graphs.training(client, "from_sidecars", dataset=dataset)
    graph["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["data", 1]}}
    run = succeed(client, graph)
    assert len(client.images(run, "show")) == 3  # thumbnails of the three pictures
    assert lora_file(comfy_server, "from_sidecars").exists()

    # A changed caption is another training, though the workflow is the same.
    (root / "sidecars" / "0.txt").write_text("another <dog>")
    graph["train"]["inputs"]["overwrite"] = True
    assert "data" not in succeed(client, graph).cached_nodes


def test_a_linked_folder_in_the_authors_layout(client, comfy_server, graphs, tmp_path):
    folder = graphs.fill_folder(tmp_path / "dog", count=2, caption=None)
    (comfy_server.base / "input" / "sets").mkdir()
    (comfy_server.base / "input" / "sets" / "authors").symlink_to(folder, target_is_directory=True)
    images = ["dataset/dreambooth/authors/0.png", "dataset/dreambooth/authors/1.png"]
    full = {
        "images": images,
        "prompts": ["a <dog> one", "a <dog> two"],
        "base_prompts": ["a dog one", "a dog two"],
        "inserting_tokens": ["<dog>"],
        "initializer_tokens": ["dog"],
    }
    plain = {"images": images, "prompts": ["a photo of sks dog"]}
    (folder / "config.json").write_text(json.dumps({"plain": plain, "full_ti": full}))
    dataset = {"folder": "sets/authors", "token": "", "initializer": ""}
    succeed(client, graphs.training(client, "from_authors", dataset=dataset))
    tokens = json.loads(metadata(lora_file(comfy_server, "from_authors"))["personalize.tokens"])
    assert [(token["trigger"], token["initializer"]) for token in tokens] == [("<dog>", "dog")]


def test_pictures_and_captions_of_the_hosts_dataset_node(client, comfy_server, graphs):
    folder = graphs.fill_folder(comfy_server.base / "input" / "for_host", count=2)
    if info := client.object_info("LoadImageTextDataSetFromFolder"):
        graphs.picture(7, size=(64, 32)).save(folder / "2.png")  # a list may hold pictures of different sizes
        (folder / "2.txt").write_text("a wide picture\nof a <dog>")
        loader = {"class_type": "LoadImageTextDataSetFromFolder", "inputs": {"folder": "for_host"}}
        dataset = {"images": ["set", 0], "captions": ["set", 1]}
        extra = {"set": loader}
    else:
        inputs = {"folder": "for_host", "clip": ["ckpt", 1], "resize_method": "None", "width": -1, "height": -1}
        extra = {"set": {"class_type": "LoadImageTextSetFromFolderNode", "inputs": inputs}, "ckpt": None}
        extra["ckpt"] = graphs.sampling("sd15")["ckpt"]
        dataset = {"images": ["set", 0], "captions": "a photo of a <dog>\na <dog> again"}
    graph = graphs.training(client, "from_host", dataset=dataset, extra=extra)
    graph["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["data", 1]}}
    run = succeed(client, graph)
    assert len(client.images(run, "show")) == (3 if info else 2)
    assert lora_file(comfy_server, "from_host").exists()


def test_pictures_with_masks_from_load_image(client, comfy_server, graphs):
    transparent = graphs.picture(3, mode="RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    extra = {
        "image": {"class_type": "LoadImage", "inputs": {"image": client.upload(transparent, "alpha.png")}},
        "opaque": {"class_type": "LoadImage", "inputs": {"image": client.upload(graphs.picture(4), "opaque.png")}},
        "invert": {"class_type": "InvertMask", "inputs": {"mask": ["image", 1]}},
        "whole": {"class_type": "InvertMask", "inputs": {"mask": ["opaque", 1]}},
    }
    for name, image, mask in (("masked", "image", "invert"), ("unmasked", "opaque", "whole")):
        dataset = {"images": [image, 0], "masks": [mask, 0], "captions": "a <dog>"}
        succeed(client, graphs.training(client, name, dataset=dataset, extra=extra, steps=1))
        assert lora_file(comfy_server, name).exists()


def test_a_style_is_trained_without_a_token(client, comfy_server, graphs):
    chain, last = graphs.picture_chain(client, captions=("a house in flat cartoon style",))
    dataset = {"pictures": [last, 0], "token": "", "initializer": ""}
    succeed(client, graphs.training(client, "style", dataset=dataset, extra=chain, steps=1))
    assert json.loads(metadata(lora_file(comfy_server, "style"))["personalize.tokens"]) == []
    assert not embedding_file(comfy_server, "style").exists()


def test_the_hosts_model_is_untouched_by_trainings(client, graphs):
    keep_loaded = {"ckpt": graphs.sampling("sdxl")["ckpt"]}
    keep_loaded["same"] = {"class_type": "VAEDecode", "inputs": {"samples": ["blank", 0], "vae": ["ckpt", 2]}}
    keep_loaded["blank"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    keep_loaded["shown"] = {"class_type": "PreviewImage", "inputs": {"images": ["same", 0]}}
    before = pixels(client, succeed(client, graphs.sampling("sdxl", prefix="before")))
    succeed(client, graphs.training(client, "beside", family="sdxl", extra=keep_loaded, overwrite=True))
    run = succeed(client, graphs.sampling("sdxl", prefix="after"))
    assert "ckpt" in run.cached_nodes and "sample" not in run.cached_nodes  # the very same model sampled again
    assert np.array_equal(before, pixels(client, run))
    client.free()
    client.wait_until_idle()
    fresh = pixels(client, succeed(client, graphs.sampling("sdxl", prefix="fresh")))
    assert np.array_equal(before, fresh)


def test_trainings_leave_no_memory_behind(client, comfy_server, graphs):
    process = psutil.Process(comfy_server.process.pid)

    def train(seed):
        succeed(client, graphs.training(client, "again", family="sdxl", overwrite=True, seed=seed, steps=1))
        return process.memory_info().rss

    sizes = [train(seed) for seed in range(5)]
    assert sizes[-1] - sizes[1] < GROWTH_LIMIT, [f"{size / 2**20:.0f} MiB" for size in sizes]
