"""Pictures, captions and settings that cannot be trained on: one sentence each, and nothing has changed."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("sampling_is_unchanged")


@pytest.fixture
def refuse(client, comfy_server, graphs):
    """refuse(*parts, folder=…, dataset=…, **settings): a training that must fail with a sentence of these parts."""

    def check(*parts, dataset=None, extra=None, **settings):
        graph = graphs.training(client, "never_written", dataset=dataset, extra=extra, **settings)
        graphs.refused(client, comfy_server, graph, *parts)

    return check


@pytest.fixture
def folder(comfy_server, graphs, request):
    """A folder of two captioned pictures in the input folder, named like the test."""
    name = "".join(c if c.isalnum() else "_" for c in request.node.name)
    return graphs.fill_folder(comfy_server.base / "input" / name, count=2)


def test_no_pictures_at_all(refuse):
    refuse("there are no pictures", "choose a folder, or connect", dataset={})


def test_pictures_from_two_places(refuse, client, graphs, folder):
    chain, last = graphs.picture_chain(client)
    dataset = {"pictures": [last, 0], "folder": folder.name}
    refuse("pictures come from 2 places", "exactly one", dataset=dataset, extra=chain)


def test_a_folder_that_lost_its_pictures(refuse, folder):
    # The folder is in the list because of the mask; its own pictures are gone.
    (folder / "more").mkdir()
    (folder / "0.png").rename(folder / "more" / "0.png")
    (folder / "1.png").rename(folder / "1.PNG.bak")
    (folder / "hidden").mkdir()
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / ".0.png").write_bytes((folder / "more" / "0.png").read_bytes())
    refuse("found no pictures", folder.name, "put PNG, JPEG or WebP files there", dataset={"folder": folder.name})


def test_masks_without_images(refuse, client, graphs, folder):
    extra = {"image": {"class_type": "LoadImage", "inputs": {"image": client.upload(graphs.picture(), "m.png")}}}
    dataset = {"folder": folder.name, "masks": ["image", 1]}
    refuse("masks are connected without images", "sub-folder mask", dataset=dataset, extra=extra)


def spoil_text(path):
    path.write_text("<html>not a picture</html>")


def spoil_truncate(path):
    Image.effect_noise((256, 256), 80).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def spoil_empty(path):
    path.write_bytes(b"")


def spoil_transparent(path):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(path)


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (spoil_text, "not a picture that can be read"),
        (spoil_truncate, "damaged or cut short"),
        (spoil_empty, "the file is empty (0 bytes)"),
        (spoil_transparent, "fully transparent"),
    ],
)
def test_a_spoiled_picture(refuse, client, graphs, folder, spoil, part):
    spoil(folder / "1.png")
    refuse(f"{folder.name}/1.png" if spoil is not spoil_transparent else "1.png", part, dataset={"folder": folder.name})
    name = client.upload((folder / "1.png").read_bytes(), f"{folder.name}.png")
    node = {"class_type": "PersonalizeTrainingPicture"}
    node["inputs"] = {"image": name, "caption": "a <dog>", "base_caption": ""}
    refuse(name, part, dataset={"pictures": ["one", 0]}, extra={"one": node})


def test_unusual_pictures_are_trained_on(client, comfy_server, graphs, folder):
    for path in folder.iterdir():
        path.unlink()
    graphs.picture(1, mode="CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)).save(folder / "deep.png")
    frames = [graphs.picture(seed) for seed in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    rotated = Image.Exif()
    rotated[0x0112] = 6
    graphs.picture(2).save(folder / "rotated.jpg", exif=rotated)
    for name in ("cmyk", "deep", "animated", "rotated"):
        (folder / f"{name}.txt").write_text(f"a <dog>, {name}")
    graph = graphs.training(client, "unusual", dataset={"folder": folder.name}, batch_size=4, steps=1)
    graph["show"] = {"class_type": "PreviewImage", "inputs": {"images": ["data", 1]}}
    run = client.run(graph)
    assert run.status == "success", run.error
    assert (comfy_server.base / "models" / "loras" / "unusual.safetensors").exists()
    shown = {
        name: np.asarray(image)
        for name, image in zip(("animated", "cmyk", "deep", "rotated"), client.images(run, "show"))
    }
    first_frame = np.asarray(frames[0].convert("RGB").resize((256, 213)))
    assert np.abs(shown["animated"][21:234].astype(int) - first_frame).mean() < 20
    assert shown["rotated"][:, 0].max() == 0  # upright: higher than wide, between black bars
    assert np.ptp(shown["deep"]) > 200  # its whole range, not clipped at 255 of 65535


CAPTIONS = {
    "missing token": ({"captions": "a photo of a dog"}, "contains none of the learned tokens", "write <dog>"),
    "malformed": ({"token": "dog"}, "token 'dog' is not usable in prompts", "such as <dog>"),
    "vocabulary": ({"token": "<|endoftext|>"}, "'<|endoftext|>' is not usable in prompts", "angle brackets"),
    "spaces": ({"token": "<my dog>"}, "'<my dog>' is not usable", "without spaces"),
    "twice": ({"token": "<dog>, <DOG>", "initializer": "dog, dog"}, "<DOG> is used twice", "name of its own"),
    "initializers": ({"token": "<dog>, <cat>"}, "2 tokens and 1 initializer words", "one word per token"),
    "unused": ({"token": "<dog>, <cat>", "initializer": "dog, cat"}, "<cat> is in no caption", "leave it out"),
    "count": ({"captions": "a <dog>\na <dog> b\na <dog> c"}, "found 3 captions for 2 pictures", "give 2, or 1"),
    "base count": ({"base_captions": "a\nb\nc"}, "found 3 base captions for 2 pictures", "give 2, or 1"),
    "no base": ({"initializer": ""}, "token <dog> has no initializer", "give the base captions"),
    "token in base": ({"base_captions": "a <dog>"}, "base caption 'a <dog>' contains", "ordinary words"),
    "cut off": ({"captions": "very " * 80 + "big <dog>"}, "<dog> is not among the first 75 tokens", "shorten"),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_and_tokens(refuse, folder, case):
    changes, *parts = CAPTIONS[case]
    refuse(*parts, dataset={"folder": folder.name, **changes})


def test_caption_files(refuse, folder):
    (folder / "1.txt").write_text("  \n")
    refuse("1.png", "the caption is empty", "describe the picture", dataset={"folder": folder.name})
    (folder / "1.txt").write_bytes(b"\xff\xfe\xfa a <dog>")
    refuse("1.txt", "not UTF-8", "save it again", dataset={"folder": folder.name})
    (folder / "1.txt").unlink()
    refuse("1.png", "found no caption", "write it into 1.txt", dataset={"folder": folder.name})


def test_a_chained_picture_without_caption(refuse, client, graphs):
    chain, last = graphs.picture_chain(client, captions=("a <dog>", ""))
    refuse("dog_1.png", "the caption is empty", "describe", dataset={"pictures": [last, 0]}, extra=chain)


def test_a_damaged_config_file(refuse, folder):
    dataset = {"folder": folder.name}
    (folder / "config.json").write_text('{"full_ti": {"images": ["0.png"')
    refuse("config.json", "not valid JSON", "correct it", dataset=dataset)
    (folder / "config.json").write_text(json.dumps({"full_ti": {"images": "0.png"}}))
    refuse("config.json", "'images' is str", "write a list", dataset=dataset)


def test_a_config_file_leads_out_of_the_input_folder(refuse, comfy_server, graphs, folder, tmp_path):
    for outside in (comfy_server.base, tmp_path):
        graphs.picture(9).save(outside / "secret.png")
    plain = {"images": ["0.png"], "prompts": ["a <dog>"], "class_prompts": ["a dog"]}
    for key, listed in (
        ("images", ["../../secret.png"]),
        ("images", [str(tmp_path / "secret.png")]),
        ("masks", ["../../secret.png"]),
        ("class_images_dir", str(tmp_path)),
    ):
        (folder / "config.json").write_text(json.dumps({"full_ti": plain | {key: listed}}))
        refuse("config.json", "found neither", "correct the path", dataset={"folder": folder.name})


SETTINGS = {
    "precision": ({"precision": "fp16"}, "precision fp16 needs a GPU", "choose fp32 or bf16"),
    "resolution": ({"resolution": 72 + 4}, "resolution must be a multiple of 8", "got 76"),
    "beta": ({"beta": -0.5}, "beta must be positive, or 0 or -1", "got -0.5"),
    "not a number": ({"learning_rate": "nan"}, "learning_rate must be a finite number", "got nan"),
    "8 bits": ({"optimizer": "adamw8bit"}, "adamw8bit needs an NVIDIA GPU", "choose adamw"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_contradict_each_other_or_the_machine(refuse, case):
    changes, *parts = SETTINGS[case]
    refuse(*parts, **changes)


REJECTED = {
    "steps": 0,
    "rank": 0,
    "batch_size": 0,
    "learning_rate": -1e-4,
    "text_learning_rate": 0.0,
    "optimizer": "sgd",
    "lr_schedule": "none",
    "precision": "int4",
    "crop": "somewhere",
    "seed": -1,
    "beta": -2.0,
    "checkpoint_limit": 0,
}


@pytest.mark.parametrize("setting", REJECTED)
def test_settings_out_of_range_are_rejected_before_queueing(client, graphs, load_helper, setting):
    graph = graphs.training(client, "never_queued", **{setting: REJECTED[setting]})
    with pytest.raises(load_helper("host/client.py").Rejected) as rejection:
        client.post(graph)
    assert any(setting in message for message in rejection.value.messages), rejection.value.messages


def test_sockets_of_another_kind_are_rejected_before_queueing(client, graphs, load_helper):
    for node, socket, link in (
        ("train", "base", ["ckpt", 0]),
        ("train", "dataset", ["data", 1]),
        ("data", "pictures", ["base", 0]),
        ("data", "images", ["data2", 0]),
    ):
        graph = graphs.training(client, "miswired") | {"ckpt": graphs.sampling()["ckpt"]}
        graph["data2"] = graph["data"]
        graph[node]["inputs"][socket] = link
        with pytest.raises(load_helper("host/client.py").Rejected, match="mismatch"):
            client.post(graph)


def test_folders_outside_the_input_folder_are_rejected_before_queueing(client, comfy_server, graphs, load_helper):
    for widget in ("folder", "class_folder"):
        for name in ("../..", "..", str(comfy_server.base / "models"), "/etc", "absent"):
            graph = graphs.training(client, "escaped", dataset={"folder": "(none)", widget: name})
            with pytest.raises(load_helper("host/client.py").Rejected) as rejection:
                client.post(graph)
            assert any("is not a folder inside ComfyUI's input folder" in m for m in rejection.value.messages)


def test_pictures_outside_the_hosts_folders_are_rejected_before_queueing(client, comfy_server, graphs, load_helper):
    outside = comfy_server.base / "secret.png"
    graphs.picture(9).save(outside)
    for name in (
        "../secret.png",
        "../secret.png [output]",
        "../input/../secret.png [temp]",
        str(outside),
        f"{outside} [input]",
        "",
        ".",
        "absent.png",
        "nul\0byte.png",
        5,
    ):
        graph, _ = graphs.picture_chain(client, captions=("a <dog>",))
        graph["p0"]["inputs"]["image"] = name
        graph = graphs.training(client, "escaped", dataset={"pictures": ["p0", 0]}, extra=graph)
        with pytest.raises(load_helper("host/client.py").Rejected) as rejection:
            client.post(graph)
        (message,) = [m for m in rejection.value.messages if "Custom validation failed" in m]
        assert "drop it on the node again" in message and "folder" in message
        assert str(comfy_server.base) not in message.replace(str(name), "")
