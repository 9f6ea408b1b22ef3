"""Training settings: what is refused, how they are read, and which of them decide the course of training."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from comfyui_personalize.models.errors import ConfigError
from comfyui_personalize.models.tokens import LearnedToken
from comfyui_personalize.trainers.config import TrainConfig, apply_overrides, build, read_toml
from comfyui_personalize.trainers.dco.config import DCOConfig, DCORun

RUN = {
    "base": {"path": "model.safetensors"},
    "dataset": {"folder": "pictures", "tokens": [{"trigger": "<dog>", "initializer": "dog"}]},
    "output": {"name": "my_dog"},
    "train": {"steps": 5, "learning_rate": 1},
}


def test_defaults_are_the_authors():
    config = DCOConfig()
    assert (config.beta, config.rank, config.learning_rate, config.text_learning_rate) == (1000.0, 32, 5e-5, 5e-6)
    assert (config.weight_decay, config.max_grad_norm, config.steps, config.batch_size) == (1e-4, 1.0, 1000, 1)


def test_settings_cannot_change_afterwards():
    with pytest.raises(FrozenInstanceError):
        DCOConfig().steps = 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("batch_size", 0), ("gradient_accumulation", 0), ("crop_variants", 0), ("preview_steps", 0),
        ("lr_cycles", 0), ("learning_rate", 0.0), ("learning_rate", -1e-4), ("learning_rate", float("nan")),
        ("learning_rate", float("inf")), ("adam_epsilon", 0.0), ("adam_beta1", 1.0), ("adam_beta2", -0.1),
        ("warmup_steps", -1), ("weight_decay", -0.1), ("max_grad_norm", -1.0), ("offset_noise", -0.1),
        ("snr_gamma", float("nan")), ("checkpoint_every", -1), ("preview_every", -1), ("preview_guidance", -1.0),
        ("lr_power", -1.0), ("checkpoint_limit", 0), ("seed", -1), ("seed", 2**63), ("resolution", 60),
        ("resolution", 100), ("resolution", 8), ("beta", -0.5), ("beta", -2.0), ("rank", 0), ("rank", 1025),
        ("text_learning_rate", 0.0), ("text_weight_decay", -0.5), ("prior_loss_weight", -1.0),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^DCOConfig\.{name} must be .*{value!r}$"):
        DCOConfig(**{name: value})


@pytest.mark.parametrize("beta", [-1, 0, 1000, 0.5])
def test_beta_takes_the_two_values_that_switch_it_off(beta):
    assert DCOConfig(beta=beta).beta == beta


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 1.5), ("steps", True), ("steps", "5"), ("learning_rate", "1e-4"), ("learning_rate", True),
        ("flip", 1), ("precision", "fp8"), ("optimizer", "sgd"), ("crop", "left"), ("preview_prompt", 3),
        ("keep", None), ("token_norm", "mine"),
    ],
)  # fmt: skip
def test_values_of_the_wrong_type_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^DCOConfig\.{name} must be .*{value!r}$"):
        DCOConfig(**{name: value})


def test_every_setting_explains_itself():
    source = Path(__file__).parents[3].joinpath("trainers/config.py").read_text()
    for field in fields(TrainConfig):
        line = next(line for line in source.splitlines() if line.startswith(f"    {field.name}: "))
        assert source.split(line)[1].lstrip().startswith('"""'), field.name


def test_a_run_is_built_from_nested_tables():
    run = build(DCORun, RUN)
    assert run.dataset.folder == Path("pictures")
    assert run.dataset.tokens == (LearnedToken("<dog>", "dog"),)
    assert (run.train.steps, run.train.learning_rate, run.train.beta) == (5, 1, 1000.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "unknown setting.s. trian in DCORun; known: .*train"),
        ({"train": {"step": 5}}, "unknown setting.s. step in train; known: .*steps"),
        ({"dataset": {"folder": "p", "tokens": [{"trigger": "<a>", "word": "a"}]}}, "unknown .* in dataset.tokens;"),
        ({"train": 5}, "train must be a table of settings, got 5"),
        ({"dataset": {"folder": "p", "captions": "a dog"}}, "dataset.captions must be a list, got 'a dog'"),
        ({"dataset": {"folder": 5}}, "dataset.folder must be of type Path, got 5"),
        ({"dataset": {"folder": "p", "tokens": [{"initializer": "dog"}]}}, "dataset.tokens lacks trigger"),
        ({"output": {}}, "output lacks name"),
        ({"base": {"path": 3}}, "base.path must be of type str, got 3"),
        ({"train": {"steps": "many"}}, "train.steps must be of type int, got 'many'"),
        ({"train": {"rank": 0}}, "DCOConfig.rank must be between 1 and 1024, got 0"),
    ],
)
def test_mistakes_in_a_run_are_named_with_their_place(change, message):
    with pytest.raises(ConfigError, match=message):
        build(DCORun, RUN | change)


def test_a_run_without_a_base_says_what_it_lacks():
    with pytest.raises(ConfigError, match="DCORun lacks base, output; add it"):
        build(DCORun, {"dataset": RUN["dataset"]})


def test_exactly_one_source_of_pictures(tmp_path):
    for dataset in ({}, {"folder": str(tmp_path), "json": "config.json"}):
        with pytest.raises(ConfigError, match="either folder or json"):
            build(DCORun, RUN | {"dataset": dataset}).dataset.open()


def test_toml_is_read_with_its_own_types(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nlearning_rate = 5e-5\nflip = true\npreview_prompt = "a <dog> läuft"\n', encoding="utf-8")
    values = read_toml(path)
    assert build(DCORun, RUN | values).train == DCOConfig(flip=True, preview_prompt="a <dog> läuft")


def test_unreadable_toml_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="missing.toml could not be read .*check the path"):
        read_toml(tmp_path / "missing.toml")
    for content in (b"steps = = 5", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(ConfigError, match="bad.toml is not valid TOML"):
            read_toml(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("word", "path", "value"),
    [
        ("train.steps=500", ("train", "steps"), 500),
        ("train.learning_rate=1e-3", ("train", "learning_rate"), 1e-3),
        ("train.flip=true", ("train", "flip"), True),
        ("train.preview_prompt=a <dog> = good", ("train", "preview_prompt"), "a <dog> = good"),
        ('train.preview_prompt="5"', ("train", "preview_prompt"), "5"),
        ("output.name=2026-11-21", ("output", "name"), "2026-11-21"),
        ("train.preview_prompt=", ("train", "preview_prompt"), ""),
        ("device=cpu", ("device",), "cpu"),
        ('dataset.captions=["one", "two"]', ("dataset", "captions"), ["one", "two"]),
        ('dataset.tokens=[{trigger="<cat>"}]', ("dataset", "tokens"), [{"trigger": "<cat>"}]),
    ],
)
def test_overrides_are_nested_and_typed(word, path, value):
    given = {"train": {"steps": 5, "rank": 4}}
    result = apply_overrides(given, [word])
    assert given == {"train": {"steps": 5, "rank": 4}}
    assert result["train"]["rank"] == 4
    for key in path:
        result = result[key]
    assert result == value and type(result) is type(value)


def test_later_overrides_win():
    assert apply_overrides({}, ["train.steps=1", "train.steps=2"]) == {"train": {"steps": 2}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.steps"], "'train.steps' is not an override; write key=value"),
        (["=5"], "'=5' is not an override"),
        (["device=cpu", "device.name=x"], "'device.name' goes through 'device', which is a single setting"),
    ],
)
def test_malformed_overrides_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        apply_overrides({}, words)


UNDECISIVE = {
    "checkpoint_every": 5, "checkpoint_limit": 3, "resume": True, "keep": "best", "save_precision": "fp32",
    "preview_every": 5, "preview_prompt": "a dog", "preview_steps": 3, "preview_guidance": 2.0,
    "gradient_checkpointing": True, "bundle_tokens": True,
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [*UNDECISIVE.items(), ("steps", 7)])
def test_what_does_not_decide_the_course_may_change_before_a_resume(name, value):
    assert DCOConfig(**{name: value}).resume_fingerprint(100, "base") == DCOConfig().resume_fingerprint(100, "base")


def test_everything_else_makes_another_run():
    defaults = DCOConfig().as_dict()
    others = {"optimizer": "adamw8bit", "crop": "center", "precision": "bf16", "token_norm": "authors", "beta": 500.0,
              "lr_schedule": "cosine", "adam_beta1": 0.5, "adam_beta2": 0.5, "text_weight_decay": 0.5}  # fmt: skip
    seen = {DCOConfig().resume_fingerprint(100, "base")}
    names = defaults.keys() - UNDECISIVE.keys() - {"steps"}
    for name in names:
        default = defaults[name]
        value = others[name] if name in others else not default if isinstance(default, bool) else default + 64
        seen.add(DCOConfig(**{name: value}).resume_fingerprint(100, "base"))
    assert len(seen) == len(names) + 1
    assert DCOConfig().resume_fingerprint(100, "another base") not in seen


@pytest.mark.parametrize("schedule", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_the_length_decides_where_the_schedule_depends_on_it(schedule):
    runs = [DCOConfig(steps=steps, lr_schedule=schedule).resume_fingerprint(steps) for steps in (100, 200)]
    assert runs[0] != runs[1]
