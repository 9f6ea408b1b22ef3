"""Checkpoints, LoRAs, names and disks that a training cannot use: one sentence each, and nothing has changed."""

import os
import pickle
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

LARGE_RANK = 256
DISK_LIMIT = 2**20
"""Bytes a file may have in the test of a full disk: more than the host's log, less than a LoRA of LARGE_RANK."""


pytestmark = pytest.mark.usefixtures("sampling_is_unchanged")


@pytest.fixture
def models(comfy_server):
    """models(kind) -> one of the host's model folders."""

    def folder(kind):
        path = comfy_server.base / "models" / kind
        path.mkdir(parents=True, exist_ok=True)
        return path

    return folder


@pytest.fixture(scope="module")
def some_lora(comfy_server, graphs, load_helper):
    """File name of a LoRA trained on the SD1.5-like model."""
    with load_helper("host/client.py").Client(comfy_server.url, timeout=graphs.SERVER_TIMEOUT) as client:
        run = client.run(graphs.training(client, "some_lora", steps=1))
        assert run.status == "success", run.error
    return "some_lora.safetensors"


def header_of(*names, shape=(4, 4)):
    return {name: torch.zeros(shape) for name in names}


def sdxl_refiner(tiny):
    """An SDXL-like model with the second text encoder alone, in the first one's place."""
    tensors = load_file(tiny("sdxl"))
    second, first = "conditioner.embedders.1.", "conditioner.embedders.0."
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith((first, second))}
    return kept | {first + n.removeprefix(second): t for n, t in tensors.items() if n.startswith(second)}


def inpainting(tiny):
    tensors = load_file(tiny("sd15"))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    return tensors | {first: torch.zeros(tensors[first].shape[0], 9, 3, 3)}


def incomplete(tiny):
    tensors = load_file(tiny("sd15"))
    del tensors["model.diffusion_model.middle_block.1.proj_in.weight"]
    return tensors


FOREIGN = {
    "flux": lambda tiny: header_of("double_blocks.0.img_attn.norm.key_norm.scale"),
    "sd3": lambda tiny: header_of("model.diffusion_model.joint_blocks.0.context_block.attn.qkv.weight"),
    "refiner": sdxl_refiner,
    "vae": lambda tiny: header_of("decoder.conv_in.weight", "encoder.conv_in.weight"),
    "lora": lambda tiny: header_of("lora_unet_mid_block.lora_down.weight"),
    "inpainting": inpainting,
    "unet": lambda tiny: {k: v for k, v in load_file(tiny("sd15")).items() if k.startswith("model.diffusion_model.")},
}
FOUND = {
    "flux": "Flux weights",
    "sd3": "SD3 weights",
    "refiner": "the SDXL refiner",
    "vae": "an autoencoder (VAE)",
    "lora": "a LoRA",
    "inpainting": "an inpainting model (9 input channels)",
    "unet": "a UNet without text encoders",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_of_another_kind(client, comfy_server, graphs, models, tiny_checkpoint, kind):
    name = f"foreign_{kind}.safetensors"
    save_file(FOREIGN[kind](tiny_checkpoint), models("checkpoints") / name)
    graph = graphs.training(client, "never_written")
    graph["base"]["inputs"]["ckpt_name"] = name
    graphs.refused(client, comfy_server, graph, name, f"found {FOUND[kind]}", "needs a whole SD1.5, SD2.1 or SDXL")


def test_damaged_checkpoints(client, comfy_server, graphs, models, tiny_checkpoint):
    whole = tiny_checkpoint("sd15").read_bytes()
    for name, data, *parts in (
        ("cut.safetensors", whole[: len(whole) // 2], "truncated", "download or copy the file again"),
        ("html.safetensors", b"<html>404</html>" * 99, "not a safetensors file", "check the download"),
        ("void.safetensors", b"", "not a safetensors file (0 bytes)", "check the download"),
        ("html.ckpt", b"<html>404</html>" * 99, "refused", "convert it to .safetensors"),
    ):
        (models("checkpoints") / name).write_bytes(data)
        graph = graphs.training(client, "never_written")
        graph["base"]["inputs"]["ckpt_name"] = name
        graphs.refused(client, comfy_server, graph, name, *parts)


def test_a_checkpoint_that_lacks_a_weight(client, comfy_server, graphs, models, tiny_checkpoint):
    save_file(incomplete(tiny_checkpoint), models("checkpoints") / "incomplete.safetensors")
    graph = graphs.training(client, "never_written")
    graph["base"]["inputs"]["ckpt_name"] = "incomplete.safetensors"
    graphs.refused(client, comfy_server, graph, "incomplete.safetensors", "is missing", "choose another file")


def test_a_vae_for_other_models(client, comfy_server, graphs, models):
    tensors = header_of("encoder.conv_in.weight") | {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3)}
    save_file(tensors, models("vae") / "sixteen.safetensors")
    graph = graphs.training(client, "never_written")
    graph["base"]["inputs"]["vae_name"] = "sixteen.safetensors"
    parts = ("sixteen.safetensors", "16 latent channels", "choose an SD1.5 VAE")
    graphs.refused(client, comfy_server, graph, *parts)


class _Malicious:
    """Creates a file when it is unpickled without protection."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", (".ckpt", ".pt", ".bin"))
@pytest.mark.parametrize("archive", (False, True))
def test_a_malicious_pickle_is_refused_without_running_it(
    client, comfy_server, graphs, models, tmp_path, suffix, archive
):
    payload, name = tmp_path / "payload", f"malicious{suffix}"
    content = {"state_dict": _Malicious(payload)}
    for kind in ("checkpoints", "loras", "embeddings"):
        if archive:
            torch.save(content, models(kind) / name)
        else:
            (models(kind) / name).write_bytes(pickle.dumps(content, protocol=2))
    load_token = {
        "class_type": "PersonalizeLoadLearnedTokens",
        "inputs": {"clip": ["ckpt", 1], "embedding_name": name, "trigger": ""},
    }
    training = graphs.training(client, "never_written")
    training["base"]["inputs"]["ckpt_name"] = name
    sampling = graphs.sampling(lora=name)
    taught = graphs.sampling() | {"load": load_token}
    taught["positive"]["inputs"]["clip"] = ["load", 0]
    export = {"lora_name": name, "layout": "diffusers", "family": "auto", "output_name": "never_written"}
    exporting = {"1": {"class_type": "PersonalizeExportLoRA", "inputs": export | {"overwrite": False}}}
    for graph in (training, sampling, taught, exporting):
        blocked = f"{os.mkdir.__module__}.mkdir, which could run code"
        graphs.refused(client, comfy_server, graph, name, blocked, "convert it to .safetensors with a tool you trust")
        assert not payload.exists()
    pickle.loads(pickle.dumps(content))
    assert payload.exists()  # the payload works


def test_a_lora_of_another_family(client, comfy_server, graphs, models, some_lora):
    graph = graphs.sampling("sdxl", lora=some_lora)
    graphs.refused(client, comfy_server, graph, some_lora, "SD1.5", "SDXL")
    save_file(load_file(models("loras") / some_lora), models("loras") / "nameless.safetensors")
    graph = graphs.sampling("sd21", lora="nameless.safetensors")
    graphs.refused(client, comfy_server, graph, "nameless.safetensors", "another model", "choose a LoRA made for SD2.1")


def test_a_damaged_lora(client, comfy_server, graphs, models, some_lora):
    whole = (models("loras") / some_lora).read_bytes()
    (models("loras") / "cut.safetensors").write_bytes(whole[:-100])
    graph = graphs.sampling(lora="cut.safetensors")
    graphs.refused(client, comfy_server, graph, "cut.safetensors", "truncated", "copy the file again")


def test_exporting_what_is_no_lora(client, comfy_server, graphs, models, tiny_checkpoint):
    save_file(header_of("decoder.conv_in.weight"), models("loras") / "vae.safetensors")
    inputs = {"lora_name": "vae.safetensors", "layout": "diffusers", "family": "auto", "output_name": "never_written"}
    graph = {"1": {"class_type": "PersonalizeExportLoRA", "inputs": inputs | {"overwrite": False}}}
    graphs.refused(client, comfy_server, graph, "vae.safetensors", "decoder.conv_in.weight", "choose another file")


BAD_NAMES = (
    "../up",
    "a/b",
    "a\\b",
    "/etc/passwd",
    "C:dog",
    "",
    "   ",
    "..",
    "con",
    "NUL.txt",
    "dog.",
    "a\nb",
    "x" * 201,
)


@pytest.mark.parametrize("node", ("PersonalizeTrainDCO", "PersonalizeExportLoRA"))
def test_output_names_that_are_rejected_before_queueing(client, graphs, load_helper, some_lora, node):
    for name in BAD_NAMES:
        if node == "PersonalizeTrainDCO":
            graph = graphs.training(client, name)
        else:
            inputs = {"lora_name": some_lora, "layout": "diffusers", "family": "auto", "overwrite": True}
            graph = {"1": {"class_type": node, "inputs": inputs | {"output_name": name}}}
        with pytest.raises(load_helper("host/client.py").Rejected) as rejection:
            client.post(graph)
        assert any("give a plain name such as my_dog" in message for message in rejection.value.messages)


def test_a_linked_output_name_is_checked_when_it_is_known(client, comfy_server, graphs):
    graph = graphs.training(client, "never_written")
    graph["name"] = {"class_type": "PrimitiveString", "inputs": {"value": "../../escaped"}}
    graph["train"]["inputs"]["output_name"] = ["name", 0]
    graphs.refused(client, comfy_server, graph, "'../../escaped'", "give a plain name such as my_dog")


def test_a_name_that_is_taken(client, comfy_server, graphs, models, some_lora):
    graph = graphs.training(client, "some_lora", seed=77)
    graphs.refused(client, comfy_server, graph, "some_lora.safetensors exists already", "turn on overwrite")
    (models("embeddings") / "token_taken.safetensors").write_bytes(b"somebody's")
    graph = graphs.training(client, "token_taken")
    graphs.refused(client, comfy_server, graph, "token_taken.safetensors exists already in embeddings", "overwrite")
    inputs = {"lora_name": some_lora, "layout": "diffusers", "family": "auto", "output_name": "some_lora"}
    graph = {"1": {"class_type": "PersonalizeExportLoRA", "inputs": inputs | {"overwrite": False}}}
    graphs.refused(client, comfy_server, graph, "some_lora.safetensors exists already", "allow overwriting")


def test_a_training_state_that_is_damaged(client, comfy_server, graphs):
    folder = comfy_server.base / "output" / "personalize" / "bad_state"
    folder.mkdir(parents=True)
    (folder / "state-00000002.safetensors").write_bytes(b"\0" * 100)
    graph = graphs.training(client, "bad_state", resume=True)
    parts = ("state-00000002.safetensors is damaged", "delete it", "turn resume off")
    graphs.refused(client, comfy_server, graph, *parts)


@pytest.mark.parametrize("kind", ("loras", "embeddings"))
def test_a_folder_that_cannot_be_written_to_is_noticed_before_training(client, comfy_server, graphs, models, kind):
    # Tests may run as root, whom permissions do not stop; a file in the folder's place stops everybody.
    models(kind).rename(models(kind).with_name("aside"))
    place = comfy_server.base / "models" / kind
    place.rmdir() if place.is_dir() else None
    place.write_text("not a folder")
    try:
        graph = graphs.training(client, "never_written")
        run = client.run(graph, timeout=graphs.SERVER_TIMEOUT)
        assert run.status == "error"
        graphs.the_sentence(run.error["exception_message"], comfy_server, f"nothing can be saved in {kind}", "writable")
        assert not any(text.startswith("encoding") for _, text in run.texts)
    finally:
        place.unlink()
        place.with_name("aside").rename(place)
    assert not list(comfy_server.base.rglob("never_written*"))
    assert client.run(graphs.sampling(prefix=f"after_{kind}")).status == "success"


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits another process's file sizes, as Linux does")
def test_a_disk_that_is_full_when_the_result_is_saved(client, comfy_server, graphs, models):
    process = comfy_server.process.pid
    unlimited = resource.prlimit(process, resource.RLIMIT_FSIZE)
    graph = graphs.training(client, "too_large", rank=LARGE_RANK, steps=1)
    resource.prlimit(process, resource.RLIMIT_FSIZE, (DISK_LIMIT, unlimited[1]))
    try:
        run = client.run(graph, timeout=graphs.SERVER_TIMEOUT)
    finally:
        resource.prlimit(process, resource.RLIMIT_FSIZE, unlimited)
    assert run.status == "error"
    message = run.error["exception_message"]
    graphs.the_sentence(message, comfy_server, "too_large.safetensors could not be saved in loras", "free space")
    assert run.progress("train")[-1] == (1, 1)
    assert not list(comfy_server.base.rglob("too_large.safetensors"))
    assert [path.name for path in (comfy_server.base / "output/personalize/too_large").iterdir()] == ["log.jsonl"]
    assert not list(comfy_server.base.rglob("*.partial"))
    graph["train"]["inputs"]["seed"] = 6
    assert client.run(graph).status == "success"
    assert (models("loras") / "too_large.safetensors").stat().st_size > DISK_LIMIT


@pytest.mark.parametrize("precision", ("fp16", "fp32"))
def test_a_loss_that_explodes_keeps_what_was_learned_before(client, comfy_server, graphs, models, precision):
    name = f"exploded_{precision}"
    graph = graphs.training(client, name, steps=50, save_precision=precision)
    graph["rate"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 1e18}}
    graph["train"]["inputs"]["learning_rate"] = ["rate", 0]
    run = client.run(graph)
    assert run.status == "success", run.error
    assert "the loss was no longer a number; the last good weights were kept" in run.outputs["train"]["text"][0]
    assert run.progress("train")[-1][0] < 50
    for kind in ("loras", "embeddings"):
        saved = load_file(models(kind) / f"{name}.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())
    assert client.run(graphs.sampling(prefix=name)).status == "success"
