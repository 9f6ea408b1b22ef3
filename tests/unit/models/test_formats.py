"""Files: complete or absent, refused when damaged or dangerous, and describing themselves."""

import errno
import json
import os
import pickle
import struct

import pytest
import torch

from comfyui_personalize.models import formats
from comfyui_personalize.models.errors import ConfigError, FormatError
from comfyui_personalize.models.formats import (
    describe,
    read_header,
    read_safetensors,
    read_torch_file,
    read_weights,
    safe_name,
    stored_layers_per_block,
    stored_tokens,
    write_safetensors,
    write_torch_file,
)
from comfyui_personalize.models.tokens import LearnedToken

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


def header_only(entries, data: bytes = b"", length: int | None = None) -> bytes:
    body = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(body) if length is None else length) + body + data


# Names


@pytest.mark.parametrize("name", ["my_dog", "My dog 2", "dog.v1", "Hündchen", "狗", "-", "a" * 200, ".hidden"])
def test_plain_names_pass(name):
    assert safe_name(name) == name


def test_spaces_around_a_name_are_dropped():
    assert safe_name("  my_dog \n") == "my_dog"


@pytest.mark.parametrize(
    "name",
    [
        "", " ", ".", "..", "...", " .. ", "../dog", "..\\dog", "a/../b", "a/b", "a\\b", "/etc/passwd", "C:\\x", "C:x",
        "\\\\server\\share", "dog.", "con", "CON", "nul.txt", "Nul .txt", "com1", "LPT9.safetensors", "aux.tar.gz",
        "a\0b", "a\nb", "a\x1bb", "a\x7fb", "a\x85b", "dog?", "dog*", 'dog"', "<dog>", "a|b", "\ud800", "a" * 201,
        "ü" * 101,
    ],
)  # fmt: skip
def test_names_that_could_leave_the_folder_or_break_a_system_are_refused(name):
    with pytest.raises(ConfigError, match="give a plain name such as my_dog"):
        safe_name(name)


# Writing


def test_what_is_written_is_read_back(tmp_path):
    path = write_safetensors(tmp_path / "new" / "dog.safetensors", TENSORS, {"key": "wört"})
    tensors, metadata = read_safetensors(path)
    assert metadata == {"key": "wört"}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) for key, value in TENSORS.items())
    header = read_header(path)
    assert header.shapes == {"a.weight": (2, 3), "b": ()}
    assert header.dtypes == {"a.weight": "F32", "b": "I64"}
    assert header.format is None
    assert [file.name for file in path.parent.iterdir()] == ["dog.safetensors"]


def test_views_and_tensors_with_gradients_are_written(tmp_path):
    table = torch.arange(12.0).reshape(3, 4).requires_grad_()
    path = write_safetensors(tmp_path / "x.safetensors", {"row": table[1], "turned": table.T, "again": table[1]}, {})
    tensors, _ = read_safetensors(path)
    assert torch.equal(tensors["row"], table[1])
    assert torch.equal(tensors["turned"], table.T)


def test_a_taken_name_is_refused_and_the_file_kept(tmp_path):
    path = write_safetensors(tmp_path / "dog.safetensors", TENSORS, {"version": "1"})
    with pytest.raises(ConfigError, match="exists already"):
        write_safetensors(path, {}, {"version": "2"})
    assert read_header(path).metadata == {"version": "1"}
    write_safetensors(path, TENSORS, {"version": "2"}, overwrite=True)
    assert read_header(path).metadata == {"version": "2"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("step", ["save_file", "replace", "fsync", "open"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_refuses_leaves_no_trace(tmp_path, monkeypatch, step, code, existing):
    path = tmp_path / "dog.safetensors"
    if existing:
        write_safetensors(path, TENSORS, {"version": "1"})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def refuse(*arguments, **_):
        if step == "save_file":  # half a file has reached the disk
            with open(arguments[1], "wb") as file:
                file.write(b"half")
        raise OSError(code, os.strerror(code))

    owner = {"save_file": formats, "replace": formats.os, "fsync": formats.os, "open": formats.os}[step]
    monkeypatch.setattr(owner, step, refuse)
    with pytest.raises(FormatError, match=f"could not be saved.*{os.strerror(code)}.*writable folder"):
        write_safetensors(path, TENSORS, {"version": "2"}, overwrite=True)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_disk_that_torch_cannot_fill_is_explained(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, limits[1]))
    try:
        with pytest.raises(FormatError, match=r"could not be saved.*\(File too large\).*writable folder"):
            write_torch_file(tmp_path / "model_ckpt.pt", {"a": torch.zeros(10**5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_no_trace(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(formats, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "dog.safetensors", TENSORS, {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused_in_our_words(tmp_path):
    (tmp_path / "folder").write_text("not one")
    with pytest.raises(FormatError, match="could not be saved"):
        write_safetensors(tmp_path / "folder" / "dog.safetensors", TENSORS, {})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_new_files_are_as_readable_as_the_system_says(tmp_path, monkeypatch):
    mask = os.umask(0o027)
    try:
        monkeypatch.setattr(formats.os, "umask", None)  # it holds for all threads, so that nobody may touch it
        path = write_safetensors(tmp_path / "dog.safetensors", TENSORS, {})
    finally:
        monkeypatch.undo()
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_another_program_holds_open_is_named_as_such(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = write_safetensors(tmp_path / "dog.safetensors", TENSORS, {})
    monkeypatch.setattr(formats.os, "replace", refuse)
    with pytest.raises(FormatError, match="close the program that uses the old file, or choose a writable folder"):
        write_safetensors(path, TENSORS, {}, overwrite=True)
    with pytest.raises(FormatError, match="free space or choose a writable folder"):
        write_safetensors(tmp_path / "new.safetensors", TENSORS, {})


# Reading safetensors


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        b"\0" * 8,
        b"\0" * 100,
        b"PK\x03\x04 a zip file, and long enough to be read as a header",
        header_only({}, length=2**63),
        header_only({}, length=2**64 - 1),
        header_only({}, length=50),
        header_only(b"not json at all"),
        header_only(b"\xff\xfe\xfd\xfc"),
        header_only(b"[" * 100_000),
        header_only([1, 2]),
        header_only("text"),
        header_only(None),
        header_only({"a": 1}),
        header_only({"a": []}),
        header_only({"a": {}}),
        header_only({"a": {"dtype": "F32", "shape": [1]}}),
        header_only({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"\0" * 4),
        header_only({"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}, b"\0" * 4),
        header_only({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header_only({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, "4"]}}, b"\0" * 4),
        header_only({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"\0" * 4),
        header_only({"__metadata__": [1]}),
        header_only({"__metadata__": "text"}),
    ],
)
def test_other_files_are_not_taken_for_safetensors(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    for read in (read_header, read_safetensors, read_weights):
        with pytest.raises(FormatError, match=r"x\.safetensors: "):
            read(path)


def test_what_was_read_no_longer_depends_on_the_file(tmp_path):
    path = write_safetensors(tmp_path / "dog.safetensors", TENSORS, {})
    tensors, _ = read_weights(path)
    with path.open("rb+") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(tensors["a.weight"], TENSORS["a.weight"])


def test_random_bytes_are_refused(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "x.safetensors"
    for size in (9, 64, 1000, 100_000):
        path.write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
        with pytest.raises(FormatError):
            read_safetensors(path)


def test_every_truncation_is_noticed_from_the_header(tmp_path):
    whole = write_safetensors(tmp_path / "whole.safetensors", TENSORS, {}).read_bytes()
    path = tmp_path / "x.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(FormatError):
            read_header(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=f"truncated, {len(whole) - 1} bytes of {len(whole)}"):
        read_header(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "BOGUS", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]},
    ],
)
def test_headers_that_contradict_themselves_are_refused(tmp_path, entry):
    path = tmp_path / "x.safetensors"
    path.write_bytes(header_only({"a": entry}, b"\0" * 4))
    with pytest.raises(FormatError, match="damaged"):
        read_safetensors(path)


@pytest.mark.parametrize("read", [read_header, read_safetensors, read_torch_file])
def test_a_missing_file_and_a_folder_are_refused(tmp_path, read):
    with pytest.raises(FormatError, match="could not be read"):
        read(tmp_path / "absent.safetensors")
    with pytest.raises(FormatError):
        read(tmp_path)


# Reading torch files


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("archive", ["plain pickle", "old torch", "torch"])
def test_a_payload_is_refused_and_never_runs(tmp_path, archive, protocol):
    path, witness = tmp_path / "x.ckpt", tmp_path / "witness"
    contents = {"state_dict": {"a": torch.zeros(2)}, "extra": Payload(witness)}
    if archive == "plain pickle":
        path.write_bytes(pickle.dumps(contents, protocol=protocol))
    else:
        torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=archive == "torch")
    for read in (read_torch_file, read_weights):
        with pytest.raises(FormatError, match="refused"):
            read(path)
    assert not witness.exists()
    torch.load(path, weights_only=False) if archive != "plain pickle" else pickle.loads(path.read_bytes())
    assert witness.exists(), "the payload would have run"


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"PK\x03\x04rest", b"\x80\x02."])
def test_other_files_are_not_taken_for_torch_files(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"x\.pt: refused"):
        read_torch_file(path)


def test_a_truncated_torch_file_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FormatError, match="refused"):
        read_torch_file(path)


def test_a_lone_tensor_is_no_named_weights(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(2), path)
    with pytest.raises(FormatError, match="contains a Tensor"):
        read_torch_file(path)


def test_plain_dictionaries_and_parameter_dictionaries_are_read(tmp_path):
    path = tmp_path / "concept.ckpt"
    held = torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.arange(3.0))})
    torch.save({"global_step": 5, "embedding": {"<dog>": torch.ones(4)}, "target_output": held}, path)
    contents = read_torch_file(path)
    assert contents["global_step"] == 5
    assert torch.equal(contents["embedding"]["<dog>"], torch.ones(4))
    assert torch.equal(contents["target_output"]["a"], torch.arange(3.0))


def test_nested_weights_are_unwrapped(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2), "step": 3}, "epoch": 1}, path)
    tensors, metadata = read_weights(path)
    assert tensors.keys() == {"a"} and metadata == {}
    torch.save({"a": torch.ones(2)}, path)
    assert read_weights(path)[0].keys() == {"a"}
    written = write_safetensors(tmp_path / "model.safetensors", TENSORS, {"k": "v"})
    assert read_weights(written)[1] == {"k": "v"}


# Metadata


def test_a_file_describes_itself(tmp_path):
    tokens = [LearnedToken("<dog>", "dog"), LearnedToken("<style>", "", 3)]
    metadata = describe(
        "lora/1",
        family="sdxl",
        method="dco",
        title="my dog",
        tokens=tokens,
        config={"beta": 1000.0, "folder": tmp_path},
        extra={"workflow": "{}"},
    )
    header = read_header(write_safetensors(tmp_path / "x.safetensors", TENSORS, metadata))
    assert header.metadata == metadata
    assert header.format == "lora/1"
    assert metadata["personalize.family"] == "sdxl"
    assert metadata["personalize.method"] == "dco"
    assert json.loads(metadata["personalize.config"]) == {"beta": 1000.0, "folder": str(tmp_path)}
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.title"] == "my dog"
    assert metadata["modelspec.trigger_phrase"] == "<dog>, <style>"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["workflow"] == "{}"
    assert stored_tokens(header.metadata) == tuple(tokens)


@pytest.mark.parametrize(("family", "architecture"), [("sd15", "stable-diffusion-v1"), ("sd21", "stable-diffusion-v2")])
def test_embedding_files_name_their_architecture(family, architecture):
    metadata = describe("embedding/1", family=family, method="dco", title="x", kind="textual-inversion")
    assert metadata["modelspec.architecture"] == f"{architecture}/textual-inversion"
    assert "modelspec.trigger_phrase" not in metadata
    assert stored_tokens(metadata) == ()


def test_layers_per_block_are_two_unless_the_file_says_otherwise():
    assert stored_layers_per_block({}) == 2
    assert stored_layers_per_block({"personalize.layers_per_block": "1"}) == 1
    for damaged in ("", "0", "-1", "two", "1.5", "100", "１"):
        with pytest.raises(FormatError, match=f"personalize.layers_per_block is '{damaged}', expected a small number"):
            stored_layers_per_block({"personalize.layers_per_block": damaged})


def test_token_lists_of_other_files_are_empty_and_damaged_ones_refused():
    assert stored_tokens({}) == ()
    wrong = ({"trigger": 5}, {"trigger": "dog"}, {"trigger": "<dog>", "initializer": None})
    wrong += tuple({"trigger": "<dog>", "rows": rows} for rows in ("2", 1.5, True, 0, None))
    for damaged in ("not json", '["<dog>"]', '[{"unknown": 1}]', "5", *(json.dumps([token]) for token in wrong)):
        with pytest.raises(FormatError, match="damaged"):
            stored_tokens({"personalize.tokens": damaged})
