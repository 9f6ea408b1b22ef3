"""Converting an authors' checkpoint in the host: what is written, what is said of the base, and what is refused."""

import importlib
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

BASE = "tiny_sdxl.safetensors"


@pytest.fixture(scope="module")
def authors_file(checkpoint, load_helper, tmp_path_factory):
    """A model_ckpt.pt of an encoder trained from the tiny SDXL-like model."""
    path = tmp_path_factory.mktemp("authors") / "model_ckpt.pt"
    return load_helper("tiny/lookahead.py").write_authors_checkpoint(path, "sdxl", checkpoint("sdxl"))


@pytest.fixture
def folder(comfy, authors_file, checkpoint):
    """The host's folder of encoders, with that checkpoint in it, and its base among the host's checkpoints."""
    encoders = comfy.base / "models" / "lookahead_encoders"
    encoders.mkdir(parents=True, exist_ok=True)
    _empty(encoders)  # other modules of this process may have left theirs
    shutil.copy(authors_file, encoders)
    bases = comfy.base / "models" / "checkpoints"
    bases.mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint("sdxl"), bases / BASE)
    yield encoders
    _empty(encoders)
    (bases / BASE).unlink()  # the folders themselves stay: the host looks for all that it has listed before


def _empty(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture
def convert(comfy):
    """convert(**inputs) -> the node's results, as the host runs it."""
    from comfyui_personalize.nodes.convert_lookahead import ConvertLookaheadCheckpoint

    node = ConvertLookaheadCheckpoint.PREPARE_CLASS_CLONE(None)
    inputs = {"encoder_name": "model_ckpt.pt", "ckpt_name": "none", "output_name": "face"}
    return lambda **changed: node.execute(**inputs | changed)


@pytest.fixture
def refused(convert, folder):
    """refused(*parts, **inputs): the node fails with one sentence that has these parts, and writes nothing."""
    from comfyui_personalize.models.errors import PersonalizeError

    def check(*parts, **inputs):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(PersonalizeError) as raised:
            convert(**inputs)
        message = str(raised.value)
        assert [part for part in parts if part not in message] == [], message
        assert str(folder) not in message and "\n" not in message
        assert sorted(path.name for path in folder.iterdir()) == before

    return check


def test_the_encoder_comes_out_and_its_base_is_recognised(comfy, convert, folder, load_helper):
    from comfyui_personalize.models.lookahead.encoder import encoder_tensors, read_encoder
    from comfyui_personalize.nodes import _host

    result = convert(ckpt_name=BASE)
    name, report = result.args
    assert name == "face.safetensors" and name in _host.model_files("lookahead_encoders")
    assert "frozen weights are the base model's" in report and "within rounding" in report
    assert result.ui["text"] == ["saved face.safetensors", report]
    encoder = read_encoder(folder / name)
    made = encoder_tensors(load_helper("tiny/lookahead.py").make_encoder("sdxl"))
    found = encoder_tensors(encoder)
    assert encoder.trained and found.keys() == made.keys()
    assert all(torch.equal(found[key], made[key]) for key in made)
    assert encoder.metadata["personalize.family"] == "sdxl" and encoder.metadata["personalize.format"].startswith(
        "lookahead-encoder/"
    )
    assert (folder / name).stat().st_size < (folder / "model_ckpt.pt").stat().st_size / 4
    assert "was not compared" in convert(output_name="again").args[1]
    assert (folder / "again.safetensors").stat().st_size == (folder / name).stat().st_size


def test_another_base_is_reported(comfy, convert, folder):
    bases = comfy.base / "models" / "checkpoints"
    tensors = load_file(bases / BASE)
    tensors["model.diffusion_model.out.2.bias"] += 0.5
    tensors["model.diffusion_model.time_embed.0.weight"][0] += 0.5
    save_file(tensors, bases / "tuned.safetensors")
    report = convert(ckpt_name="tuned.safetensors").args[1]
    assert (
        "2 of " in report
        and "conv_out.bias, time_embedding.linear_1.weight" in report
        or ("time_embedding.linear_1.weight, conv_out.bias" in report)
    )
    assert "differ from the base model's, by up to 0.5" in report


def test_bases_that_cannot_be_compared(comfy, refused, checkpoint):
    bases = comfy.base / "models" / "checkpoints"
    shutil.copy(checkpoint("sd15"), bases / "sd15.safetensors")
    refused("sd15.safetensors: found no SDXL model", "or none", ckpt_name="sd15.safetensors")
    tensors = load_file(bases / BASE)
    removed = "model.diffusion_model.middle_block.1.proj_in.weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != removed}, bases / "cut.safetensors")
    refused("cut.safetensors", "is missing", ckpt_name="cut.safetensors")
    (bases / "html.safetensors").write_bytes(b"<html>404</html>" * 99)
    refused("html.safetensors: not a safetensors file", ckpt_name="html.safetensors")


class _Malicious:
    """Creates a folder when it is unpickled without protection."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_files_that_are_no_checkpoint_of_the_authors(refused, folder, tmp_path):
    whole = (folder / "model_ckpt.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refused("cut.pt: refused, it is damaged", encoder_name="cut.pt")
    torch.save({"image_proj": {"latents": torch.ones(1, 2, 3)}, "ip_adapter": {}}, folder / "plus.bin")
    refused("plus.bin: found no checkpoint of LCM-Lookahead's authors", encoder_name="plus.bin")
    torch.save({"encoder_unet.a.extract_kv2.b": _Malicious(tmp_path / "payload")}, folder / "bad.pt")
    refused("bad.pt: refused, it contains", "could run code", encoder_name="bad.pt")
    assert not (tmp_path / "payload").exists()
    tensors = torch.load(folder / "model_ckpt.pt", weights_only=True)
    del tensors["image_proj_model.latents"]
    torch.save(tensors, folder / "headless.pt")
    refused("headless.pt: these", "no IP-Adapter Plus resampler", encoder_name="headless.pt")
    refused("absent.pt is not in the lookahead_encoders folder any more", encoder_name="absent.pt")


def test_names_that_are_taken_or_lead_elsewhere(refused, convert, folder):
    (folder / "mine.safetensors").write_bytes(b"somebody's")
    refused("mine.safetensors exists already in lookahead_encoders", "allow overwriting", output_name="mine")
    refused("'../up'", "give a plain name such as my_dog", output_name="../up")
    assert convert(output_name="mine", overwrite=True).args[0] == "mine.safetensors"
    assert (folder / "mine.safetensors").read_bytes() != b"somebody's"


def test_what_is_refused_before_queueing(comfy, folder):
    from comfyui_personalize.nodes.convert_lookahead import ConvertLookaheadCheckpoint as Node

    fine = {"output_name": "face", "encoder_name": "model_ckpt.pt", "ckpt_name": BASE}
    assert Node.validate_inputs(**fine) is True and Node.validate_inputs() is True
    for name, value, said in (
        ("output_name", "a/b", "give a plain name"),
        ("encoder_name", "gone.pt", "there is no checkpoint of an encoder named 'gone.pt'"),
        ("ckpt_name", "gone.safetensors", "there is no checkpoint named 'gone.safetensors'"),
    ):
        assert said in Node.validate_inputs(**fine | {name: value})
    version = Node.fingerprint_inputs(**fine)
    os.utime(folder / "model_ckpt.pt", ns=(1, 1))
    assert Node.fingerprint_inputs(**fine) != version


def test_a_cancel_leaves_no_file(comfy, convert, folder, monkeypatch):
    from comfyui_personalize.nodes import _host

    report, reported = _host.HostProgress.report, []

    def cancelled_midway(progress, step, total, *rest):
        reported.append(step)
        if step == 20:
            comfy.model_management.interrupt_current_processing(True)
        report(progress, step, total, *rest)

    monkeypatch.setattr(_host.HostProgress, "report", cancelled_midway)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        convert(ckpt_name=BASE)
    assert reported[-1] == 20
    assert [path.name for path in folder.iterdir()] == ["model_ckpt.pt"]
    comfy.model_management.interrupt_current_processing(False)


def test_our_folders_join_those_of_extra_model_paths(comfy, tmp_path, monkeypatch):
    from comfyui_personalize.nodes import _folders

    kinds = comfy.folder_paths.folder_names_and_paths
    monkeypatch.setattr(
        comfy.folder_paths, "folder_names_and_paths", {k: v for k, v in kinds.items() if k not in _folders.ENDINGS}
    )
    comfy.folder_paths.add_model_folder_path("lookahead_encoders", str(tmp_path))  # as the host reads the .yaml
    importlib.reload(_folders)
    ours = comfy.base / "models" / "lookahead_encoders"
    assert comfy.folder_paths.get_folder_paths("lookahead_encoders") == [str(ours), str(tmp_path)]
    assert comfy.folder_paths.get_folder_paths("identities") == [str(comfy.base / "models" / "identities")]
    for name in ("a.safetensors", "b.PT", "c.bin", "notes.txt", "d.yaml"):
        (tmp_path / name).touch()
    assert comfy.folder_paths.get_filename_list_("lookahead_encoders")[0] == ["a.safetensors", "b.PT", "c.bin"]
    assert comfy.folder_paths.get_full_path("lookahead_encoders", "c.bin") == str(tmp_path / "c.bin")
