"""The authors' checkpoints: as they wrote them, with the config's classes inside, damaged, and hostile."""

import sys
from types import ModuleType

import pytest
import torch

from comfyui_personalize.models.errors import ConfigError, FormatError
from comfyui_personalize.models.perfusion import read_concept

STEM = "input_blocks.1.1.transformer_blocks.0.attn2."


def contents(words=("teddy",)):
    generator = torch.Generator().manual_seed(0)
    draws = {name: torch.randn(77, 4, generator=generator) for name in ("to_k", "to_v")}
    vectors = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.randn(1, 6, generator=generator))})
    return {
        "global_step": 400,
        "C_inv": torch.eye(6),
        "target_input": torch.randn(6, generator=generator),
        "embedding": {"initializer_words": words, "string_to_token": {"*": 265}, "string_to_param": vectors},
        "target_output": {f"{STEM}{name}.target_output": rows for name, rows in draws.items()},
    }


def saved(path, entries):
    torch.save(entries, path)
    return path


def test_names_become_ours_and_the_word_the_files(tmp_path):
    entries = contents(["teddy"])
    concept = read_concept(saved(tmp_path / "my bear.ckpt", entries))
    assert (concept.trigger, concept.superclass, concept.family) == ("<my-bear>", "teddy", None)
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn2."
    assert concept.parts.outputs.keys() == {f"{stem}to_k", f"{stem}to_v"}
    assert torch.equal(concept.parts.outputs[f"{stem}to_v"], entries["target_output"][f"{STEM}to_v.target_output"])
    assert torch.equal(concept.parts.dual, entries["target_input"]), "C⁻¹ is the identity here"
    assert read_concept(tmp_path / "my bear.ckpt", "rex").trigger == "<rex>"
    with pytest.raises(ConfigError, match="not usable in prompts"):
        read_concept(tmp_path / "my bear.ckpt", "a b")


def test_a_file_without_superclass_word(tmp_path):
    assert read_concept(saved(tmp_path / "cat.ckpt", contents([]))).superclass == ""
    assert read_concept(saved(tmp_path / "dog.ckpt", contents(["  dog"]))).superclass == "  dog"


@pytest.fixture
def config_classes(monkeypatch):
    """Classes that are pickled under the names of OmegaConf's, which keeps a list's entries and its parents."""

    def define(path):
        module, name = path.rsplit(".", 1)
        defined = type(name, (), {"__module__": module, "__qualname__": name})
        for parent in (module.split(".")[0], module):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setattr(sys.modules[module], name, defined, raising=False)
        return defined

    paths = ("omegaconf.listconfig.ListConfig", "omegaconf.dictconfig.DictConfig", "omegaconf.nodes.AnyNode")
    return [define(path) for path in paths]


def test_the_configs_own_list_of_words_is_read(config_classes, tmp_path):
    make_list, make_dict, make_node = config_classes
    words, parent, node = make_list(), make_dict(), make_node()
    vars(node).update(_val="teddy", _parent=words, _metadata={"object_type": dict, "element_type": list, "key": int})
    vars(parent).update(_content={"initializer_words": words}, _parent=None)
    vars(words).update(_content=[node], _parent=parent)
    concept = read_concept(saved(tmp_path / "bear.ckpt", contents(words)))
    assert concept.superclass == "teddy"
    vars(words).update(_content=None)
    assert read_concept(saved(tmp_path / "bear.ckpt", contents(words))).superclass == ""
    vars(node).update(_val=3)
    vars(words).update(_content=[node])
    with pytest.raises(FormatError, match="no list of words"):
        read_concept(saved(tmp_path / "bear.ckpt", contents(words)))


class Hostile:
    def __reduce__(self):
        return print, ("this ran",)


def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, capsys):
    path = saved(tmp_path / "bear.ckpt", contents(["teddy"]) | {"global_step": Hostile()})
    with pytest.raises(FormatError, match="could run code"):
        read_concept(path)
    assert capsys.readouterr().out == ""


def without(entries, *path):
    inner = entries
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return entries


def changed(**entries):
    return contents(["teddy"]) | entries


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (lambda: without(contents(), "C_inv"), "C_inv is missing"),
        (lambda: without(contents(), "target_input"), "target_input is missing"),
        (lambda: without(contents(), "target_output"), "target_output is missing"),
        (lambda: without(contents(), "embedding"), "string_to_param is missing"),
        (lambda: changed(embedding=[1]), "string_to_param is missing"),
        (lambda: changed(embedding={"string_to_param": {}}), "0 words instead of one"),
        (lambda: changed(embedding={"string_to_param": {"*": 3}}), "missing or no tensor"),
        (lambda: changed(embedding={"string_to_param": {"*": torch.ones(6)}}), "the word's embedding"),
        (lambda: changed(embedding={"string_to_param": {"*": torch.full((1, 6), torch.nan)}}), "no numbers"),
        (lambda: contents("teddy"), "no list of words"),
        (lambda: contents([3]), "no list of words"),
        (lambda: changed(target_input=torch.ones(5)), r"beside a C_inv of 6"),
        (lambda: changed(target_input=torch.full((6,), torch.nan)), "no numbers"),
        (lambda: changed(target_input=torch.zeros(6)), "no positive energy"),
        (lambda: changed(C_inv=-torch.eye(6)), "not positive definite"),
        (lambda: changed(C_inv=torch.eye(6)[:5]), "square matrix"),
        (lambda: changed(target_output={}), "incomplete"),
        (lambda: changed(target_output={3: torch.ones(2)}), "has an entry 3"),
        (lambda: changed(target_output={"x.weight": torch.ones(2)}), "has an entry 'x.weight'"),
        (lambda: changed(target_output={"x.target_output": torch.ones(2, 2)}), "no part of a concept"),
        (lambda: changed(target_output={f"{STEM}to_v.target_output": torch.ones(77, 4)}), "incomplete"),
        (lambda: changed(target_output={f"{STEM}to_v.target_output": "text"}), "missing or no tensor"),
    ],
)
def test_damaged_files_are_refused(entries, message, tmp_path):
    with pytest.raises(FormatError, match=message):
        read_concept(saved(tmp_path / "bear.ckpt", entries()))


def test_truncated_files_are_refused(tmp_path):
    path = saved(tmp_path / "bear.ckpt", contents(["teddy"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="bear.ckpt: "):
        read_concept(path)
