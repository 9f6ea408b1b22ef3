"""Which ComfyUI the demo and the tests use."""

import pytest


@pytest.fixture
def finder(load_helper, monkeypatch, tmp_path):
    """The module, in a world where the project lies in tmp_path/work/project and home is tmp_path/home."""
    module = load_helper("tiny/find_host.py")
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "PROJECT", tmp_path / "work" / "project")
    return module


def make_comfyui(path):
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    return path


def test_no_comfyui_is_none(finder):
    assert finder.find_comfyui() is None


def test_a_folder_without_main_py_does_not_count(finder, tmp_path):
    (tmp_path / "work" / "ComfyUI" / "comfy").mkdir(parents=True)
    assert finder.find_comfyui() is None


def test_nearer_places_come_first(finder, tmp_path, monkeypatch):
    places = ("work/project/ComfyUI", "home/comfy/ComfyUI", "home/ComfyUI", "work/ComfyUI")
    for place in places:
        expected = make_comfyui(tmp_path / place)
        assert finder.find_comfyui() == expected

    enclosing = make_comfyui(tmp_path / "elsewhere" / "ComfyUI")
    monkeypatch.setattr(finder, "PROJECT", enclosing / "custom_nodes" / "comfyui-personalize")
    make_comfyui(enclosing / "custom_nodes" / "ComfyUI")
    assert finder.find_comfyui() == enclosing

    chosen = make_comfyui(tmp_path / "chosen")
    monkeypatch.setenv("COMFYUI_PATH", str(chosen))
    assert finder.find_comfyui() == chosen


def test_a_wrong_comfyui_path_is_refused_although_another_exists(finder, tmp_path, monkeypatch):
    make_comfyui(tmp_path / "home" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="COMFYUI_PATH is .*absent.* unset it"):
        finder.find_comfyui()


def test_an_empty_comfyui_path_is_as_good_as_none(finder, tmp_path, monkeypatch):
    expected = make_comfyui(tmp_path / "home" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert finder.find_comfyui() == expected
