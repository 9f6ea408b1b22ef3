"""Estimating covariances from caption files: streamed, cancelled, continued, refused; and the recipes' settings."""

import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, DatasetError, FormatError
from comfyui_personalize.models.perfusion import CovarianceEstimate, read_covariance
from comfyui_personalize.trainers.base import TrainingBase
from comfyui_personalize.trainers.config import build
from comfyui_personalize.trainers.perfusion import covariance, train
from comfyui_personalize.trainers.perfusion.config import PerfusionRun
from comfyui_personalize.trainers.perfusion.covariance_config import CovarianceConfig, CovarianceRun
from comfyui_personalize.trainers.progress import SilentProgress
from comfyui_personalize.trainers.ranks import Ranks
from comfyui_personalize.trainers.text import PromptEncoder

FOLDER = Path(train.__file__).parent
WORDS = "dog cat tree red blue house sky old small river car boat green man photo of a on the in".split()


class CancelAfter(SilentProgress):
    """The user cancels when so many captions are done."""

    def __init__(self, captions):
        self.captions, self.done = captions, 0

    def report(self, step, total, message="", preview=None):
        self.done = step

    def cancelled(self):
        return self.done >= self.captions


@pytest.fixture
def captions(tmp_path):
    """A file of 40 captions with an empty line among them, a byte order mark and Windows line ends."""
    draws = torch.randint(0, len(WORDS), (40, 12), generator=torch.Generator().manual_seed(0)).tolist()
    lines = [" ".join(WORDS[number] for number in row) for row in draws]
    lines.insert(7, "   ")
    path = tmp_path / "captions.txt"
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    return path


@pytest.fixture
def estimate(tiny, captions):
    """estimate(name, **settings): run the recipe on a tiny model."""

    def run(name="cov", family="sd15", *, path=captions, progress=None, overwrite=False, **settings):
        config = CovarianceConfig(**{"batch_size": 8} | settings)
        place = tiny.place(name, overwrite=overwrite)
        return covariance.estimate(
            config, tiny.base(family), path, place, device=torch.device("cpu"), progress=progress
        )

    return run


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_the_file_holds_the_inverse_covariance_of_all_positions(estimate, tiny, captions, family):
    result = estimate(family=family)
    assert (result.captions, result.total) == (40, 40)
    base = tiny.base(family)
    lines = [line for line in captions.read_text("utf-8-sig").splitlines() if line.strip()]
    encoder = PromptEncoder(base.family, base.load_text_encoders(), base.tokenizer())
    expected = CovarianceEstimate(base.unet.config["cross_attention_dim"])
    expected.add(encoder.encode_frozen(lines).embeds)
    found = read_covariance(result.file)
    matrix = torch.linalg.inv(found.inverse)
    torch.testing.assert_close(matrix, expected.matrix(), rtol=1e-3, atol=1e-4)
    assert found.metadata["personalize.family"] == family and found.metadata["personalize.captions"] == "40"
    found.check_family(family)


def test_cancel_and_go_on_equal_one_run(estimate, tiny):
    whole = estimate("whole")
    cut = estimate("parts", progress=CancelAfter(16))
    assert (cut.file, cut.captions) == (None, 16)
    assert not tiny.place("parts").lora_path.exists()
    assert "16 of 40 captions; run it again" in cut.summary
    rest = estimate("parts")
    assert torch.equal(read_covariance(rest.file).inverse, read_covariance(whole.file).inverse)
    assert not (tiny.place("parts").run_folder / covariance.STATE_NAME).exists()


def test_a_sum_of_other_captions_settings_or_a_damaged_one_is_not_continued(estimate, tiny, captions):
    expected = estimate("whole", captions=24)
    estimate("parts", progress=CancelAfter(16))
    state = tiny.place("parts").run_folder / covariance.STATE_NAME
    other = estimate("parts", captions=24)
    assert torch.equal(read_covariance(other.file).inverse, read_covariance(expected.file).inverse)
    estimate("again", progress=CancelAfter(16))
    state = tiny.place("again").run_folder / covariance.STATE_NAME
    state.write_bytes(state.read_bytes()[:100])
    assert estimate("again", captions=24).captions == 24
    estimate("anew", progress=CancelAfter(16))
    assert estimate("anew", resume=False).captions == 40


def test_the_sum_is_saved_on_the_way(estimate, monkeypatch):
    saved, save = [], covariance._save
    monkeypatch.setattr(covariance, "_save", lambda sums, *a: saved.append(sums.captions) or save(sums, *a))
    estimate(save_every=16)
    assert saved == [16, 32]
    saved.clear()
    estimate("b", save_every=0)
    assert saved == []


def test_long_captions_are_cut_without_a_word(estimate, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(" ".join(WORDS * 6) + f" {number}" for number in range(3)) + "\na dog\n" * 30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        try:
            estimate(path=path)
        except ConfigError as error:  # so few different captions determine nothing, which is told at the end
            assert "do not determine a covariance of width 64" in str(error)


@pytest.fixture
def loads_nothing(monkeypatch):
    """Fail when a text encoder is loaded."""
    monkeypatch.setattr(TrainingBase, "load_text_encoders", lambda *arguments: pytest.fail("loaded a model"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no captions; give a file with one caption per line"),
        (b"\n \n\n", "holds no captions"),
        (b"\xff\xfe\x00 caption", "is no text in UTF-8; save it as UTF-8"),
        (b"x" * 70000, "a line is longer than any caption"),
        (None, r"could not be read \(No such file or directory\); check the path"),
    ],
)
def test_what_holds_no_captions_is_refused_before_anything_is_loaded(
    content, message, estimate, tmp_path, loads_nothing
):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        estimate(path=path)


def test_an_existing_file_is_refused_before_anything_is_loaded(estimate, tiny, loads_nothing):
    tiny.place("cov").lora_path.parent.mkdir(parents=True)
    tiny.place("cov").lora_path.write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="cov.safetensors exists already"):
        estimate()
    assert tiny.place("cov").lora_path.read_bytes() == b"somebody's"


def test_a_full_disk_keeps_the_sum(estimate, tiny, monkeypatch):
    def full(*arguments, **keywords):
        raise FormatError("cov.safetensors could not be saved (No space left on device)")

    monkeypatch.setattr(covariance, "write_covariance", full)
    with pytest.raises(FormatError, match="No space left"):
        estimate(save_every=16)
    monkeypatch.undo()
    assert (tiny.place("cov").run_folder / covariance.STATE_NAME).is_file()
    assert estimate(save_every=16).captions == 40


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        CovarianceConfig(batch_size=0)
    with pytest.raises(ConfigError, match="precision must be one of"):
        CovarianceConfig(precision="fp8")


# The command line


def test_the_examples_show_every_setting_with_its_default():
    def check(shown, config, hidden=frozenset()):
        values = {name: getattr(config, name) for name in type(config).__dataclass_fields__}
        assert shown == {name: value for name, value in values.items() if name not in hidden}

    values = tomllib.loads((FOLDER / "example.toml").read_text())
    run = build(PerfusionRun, values)
    check(values["train"], type(run.train)(), {"bundle_tokens"})
    values = tomllib.loads((FOLDER / "covariance.example.toml").read_text())
    run = build(CovarianceRun, values)
    check(values["estimate"], type(run.estimate)())


def test_the_commands_make_a_covariance_and_a_concept(tiny, captions, capsys):
    base, output = {"path": str(tiny._checkpoint("sd15"))}, {"name": "tiny", "folder": str(tiny.folder / "out")}
    values = {"device": "cpu", "base": base, "captions": str(captions), "output": output}
    assert covariance.run(values, SilentProgress(), Ranks()) == 0
    made = tiny.folder / "out" / "perfusion_covariances" / "tiny.safetensors"
    assert f"saved {made}" in capsys.readouterr().out
    dataset = {
        "folder": str(tiny.pictures),
        "captions": ["a photo of a <teddy>"],
        "tokens": [{"trigger": "<teddy>", "initializer": "teddy"}],
    }
    settings = {"steps": 1, "batch_size": 1, "gradient_accumulation": 1, "resolution": 64}
    values = {"device": "cpu", "base": base, "dataset": dataset, "output": output, "train": settings}
    with pytest.raises(ConfigError, match="make one with the node Estimate Text Covariance or with the command perf"):
        train.run(values, SilentProgress(), Ranks())
    assert train.run(values | {"covariance": str(made)}, SilentProgress(), Ranks()) == 0
    assert f"saved {tiny.folder / 'out' / 'perfusion_concepts' / 'tiny.safetensors'}" in capsys.readouterr().out
