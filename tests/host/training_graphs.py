"""Workflows in API format that train, and the pictures for them; shared by the tests of training in the host."""

from PIL import Image, ImageDraw

SERVER_TIMEOUT = 300.0
SIDE = 64
QUICK = {
    "steps": 2,
    "rank": 2,
    "resolution": SIDE,
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-3,
    "gradient_checkpointing": False,
    "preview_every": 0,
    "save_precision": "fp32",
    "seed": 5,
}
"""Settings of Train DCO that take seconds on a tiny model; the others keep their defaults."""


def picture(seed=0, size=(48, 40), mode="RGB"):
    """A drawn picture, another one for every seed."""
    image = Image.new("RGB", size, (40 * seed % 256, 90, 200 - 30 * seed % 200))
    draw = ImageDraw.Draw(image)
    draw.ellipse((4 + seed, 6, 28 + seed, 30), fill=(230, 60 + 20 * seed % 190, 40))
    draw.rectangle((30, 10 + seed % 5, 44, 36), fill=(30, 200, 20 * seed % 256))
    return image.convert(mode)


def fill_folder(folder, count=3, caption="a photo of a <dog> number {}", base_caption=None, suffix=".png"):
    """A folder of pictures with text files beside them, unless their text is None; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture(index).save(folder / f"{index}{suffix}")
        for text, ending in ((caption, ".txt"), (base_caption, ".base.txt")):
            if text is not None:
                (folder / f"{index}{ending}").write_text(text.format(index), encoding="utf-8")
    return folder


def defaults(client, node):
    """A node's inputs as the page would send them untouched: defaults, and the first of each list."""
    inputs = client.object_info(node)["input"]
    found = {}
    for name, (kind, *options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        options = options[0] if options else {}
        choices = kind if isinstance(kind, list) else options.get("options", [])
        if "default" in options:
            found[name] = options["default"]
        elif choices:
            found[name] = choices[0]
    return found


def base_node(family):
    return {
        "class_type": "PersonalizeLoadTrainingBase",
        "inputs": {"ckpt_name": f"tiny_{family}.safetensors", "vae_name": "(from the checkpoint)"},
    }


def dataset_node(**inputs):
    """Personalization Dataset with the token <dog>."""
    return {
        "class_type": "PersonalizePersonalizationDataset",
        "inputs": {
            "folder": "(none)",
            "captions": "",
            "base_captions": "",
            "token": "<dog>",
            "initializer": "dog",
            "rows_per_token": 1,
            "class_folder": "(none)",
            "class_caption": "",
        }
        | inputs,
    }


def picture_chain(client, captions=("a <dog> on grass", "a <dog> in snow"), base_captions=None, seed=0):
    """Nodes "p0", "p1"... of uploaded pictures, each linked to the one before; the last one's name comes second."""
    graph, last = {}, None
    for index, caption in enumerate(captions):
        inputs = {
            "image": client.upload(picture(seed + index), f"dog_{seed + index}.png"),
            "caption": caption,
            "base_caption": base_captions[index] if base_captions else "",
        }
        if last is not None:
            inputs["pictures"] = [last, 0]
        last = f"p{index}"
        graph[last] = {"class_type": "PersonalizeTrainingPicture", "inputs": inputs}
    return graph, last


def training(client, name, *, family="sd15", dataset=None, extra=None, **settings):
    """A whole training: "base", "data" and "train", saving under ``name``.

    Args:
        dataset: inputs of the dataset node; None trains on two pictures in a chain.
        extra: more nodes.
        settings: of Train DCO, over QUICK.
    """
    graph = dict(extra or {})
    if dataset is None:
        chain, last = picture_chain(client)
        graph |= chain
        dataset = {"pictures": [last, 0]}
    graph["base"] = base_node(family)
    graph["data"] = dataset_node(**dataset)
    inputs = defaults(client, "PersonalizeTrainDCO") | QUICK | settings
    inputs |= {"base": ["base", 0], "dataset": ["data", 0], "output_name": name}
    graph["train"] = {"class_type": "PersonalizeTrainDCO", "inputs": inputs}
    return graph


def sampling(
    family="sd15", *, prompt="a photo of a dog", lora=None, prefix="plain", seed=1, loader="PersonalizeLoadDCOLoRA"
):
    """Text to image in two steps: "ckpt", "lora" if there is one, "positive", "sample", "save".

    Args:
        lora: name of a LoRA file, or a link such as ["train", 0].
        loader: node that loads it; the stock one is "LoraLoader".
    """
    source = "ckpt"
    graph = {"ckpt": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"tiny_{family}.safetensors"}}}
    if lora is not None:
        source = "lora"
        inputs = {"model": ["ckpt", 0], "clip": ["ckpt", 1], "lora_name": lora}
        inputs |= {"strength_model": 1.0, "strength_clip": 1.0}
        graph["lora"] = {"class_type": loader, "inputs": inputs | ({} if loader == "LoraLoader" else {"tokens": ""})}
    graph |= {
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": [source, 1], "text": prompt}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": [source, 1], "text": ""}},
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": SIDE, "height": SIDE, "batch_size": 1}},
        "sample": {
            "class_type": "KSampler",
            "inputs": {
                "model": [source, 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["empty", 0],
                "seed": seed,
                "steps": 2,
                "cfg": 4.0,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1.0,
            },
        },
        "decode": {"class_type": "VAEDecode", "inputs": {"samples": ["sample", 0], "vae": ["ckpt", 2]}},
        "save": {"class_type": "SaveImage", "inputs": {"images": ["decode", 0], "filename_prefix": prefix}},
    }
    return graph


def files_below(base):
    """Every file of the models, input and output folders with its size and time of writing."""
    return {
        str(path.relative_to(base)): (path.stat().st_size, path.stat().st_mtime_ns)
        for folder in ("models", "input", "output")
        for path in sorted((base / folder).rglob("*"))
        if path.is_file()
    }


def the_sentence(message, server, *parts):
    """Assert that an error message is one short sentence with all of `parts`, and names no folder of the machine."""
    message = message.strip()
    assert all(part in message for part in parts), message
    assert "\n" not in message and "Traceback" not in message and len(message) < 420, message
    assert str(server.base) not in message, message
    assert any(mark in message for mark in ";,"), f"says not what to do: {message}"


def refused(client, server, graph, *parts):
    """Run a graph that must fail in one of our nodes, with one sentence and no change to any file."""
    before = files_below(server.base)
    run = client.run(graph, timeout=SERVER_TIMEOUT)
    assert run.status == "error", run.status
    assert run.error["node_type"].startswith("Personalize")
    the_sentence(run.error["exception_message"], server, *parts)
    assert files_below(server.base) == before
    works = {
        "empty": {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 0}},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["empty", 0]}},
    }
    assert client.run(works).status == "success"
