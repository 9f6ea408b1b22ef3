"""Who may import whom, what is loaded when, and that packaging lists every folder."""

import ast
import functools
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("models", "trainers", "nodes")

# layer -> (our layers it may use, packages it may use besides the standard library)
MAY_IMPORT = {
    "models": ({"models"}, {"torch", "einops", "safetensors", "numpy", "PIL"}),
    "trainers": (
        {"models", "trainers"},
        {"torch", "einops", "safetensors", "numpy", "PIL", "diffusers", "transformers", "peft", "accelerate"}
        | {"psutil"},
    ),
    "nodes": (
        {"models", "trainers", "nodes"},
        {"torch", "einops", "safetensors", "numpy", "PIL"}
        | {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "node_helpers", "server"},
    ),
}
# Extras: imported inside a function, so that their absence disables one feature and nothing else.
ONLY_INSIDE_A_FUNCTION = {
    "insightface": {"models/faces.py"},
    "onnxruntime": {"models/faces.py"},  # comes with insightface
    "bitsandbytes": {"trainers/"},
    "prodigyopt": {"trainers/"},
    "dreamsim": {"trainers/lookahead/"},
    "lpips": {"trainers/lookahead/"},
}
HEAVY = {"diffusers", "transformers", "peft", "accelerate", "insightface", "bitsandbytes"}
# Modules that ComfyUI reads while it starts: nothing that they reach may import a heavy package.
LIGHT = ("nodes", "trainers", "trainers.registry", "trainers.config", "trainers.dataset", "trainers.progress", "models")


@dataclass(frozen=True)
class Import:
    """One imported module: dotted name, relative to the package root when it is ours."""

    name: str
    ours: bool
    inside_function: bool

    @property
    def top(self) -> str:
        return self.name.split(".")[0]


def imports_of(source: str, package: str) -> Iterator[Import]:
    """Every import in `source`, a module of the sub-package `package` ("" is the root, else "trainers.dco")."""

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from visit(child, inside)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, alias.name.startswith("comfyui_personalize"), inside)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield Import(node.module, node.module.startswith("comfyui_personalize"), inside)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".") if package else []
            base = parents[: len(parents) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:  # `from .x import y`: y may be a module, so both are named
                yield Import(".".join([*base, alias.name]), True, inside)
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(ast.parse(source), inside=False)


def complaints(path: str, source: str) -> list[str]:
    """What `source`, lying at `path` under the root, does that the import table forbids."""
    parts = Path(path).parts
    layer, package = parts[0], ".".join(parts[:-1])
    our_layers, packages = MAY_IMPORT[layer]
    found = []
    for item in imports_of(source, package):
        if item.ours and item.top == "comfyui_personalize":
            found.append(f"{path}: imports {item.name} absolutely; ComfyUI knows the package by another name")
        elif item.ours and item.top not in our_layers:
            found.append(f"{path}: {layer}/ must not import {item.name}")
        elif item.ours and (method := method_of(item.name)) and method_of(package) not in (None, method):
            found.append(f"{path}: one method must not import another: {item.name}")
        elif not item.ours and item.top in ONLY_INSIDE_A_FUNCTION:
            places = ONLY_INSIDE_A_FUNCTION[item.top]
            if not item.inside_function or not any(path.startswith(place) for place in places):
                found.append(f"{path}: {item.name} is optional; import it inside a function of {sorted(places)}")
        elif not item.ours and item.top not in packages | set(sys.stdlib_module_names):
            found.append(f"{path}: {layer}/ must not import {item.name}")
    return found


def method_of(module: str) -> str | None:
    """The method folder that a dotted module lies in: "dco" for "models.dco.loss", None for a shared module."""
    parts = module.split(".")
    if len(parts) > 1 and parts[0] in ("models", "trainers") and (ROOT / parts[0] / parts[1]).is_dir():
        return parts[1]
    return None


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of the three layers: "trainers.dco.train" -> file."""
    files = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def package_of(module: str) -> str:
    """The package against which `module`'s relative imports are resolved."""
    return module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]


@functools.cache
def imported_by(module: str) -> list[Import]:
    """What importing `module` itself imports at once."""
    found = imports_of(modules()[module].read_text(), package_of(module))
    return [item for item in found if not item.inside_function]


def loaded_with(module: str) -> dict[str, set[str]]:
    """Modules of ours that importing `module` loads, each with the outside packages that it imports."""
    known, reached, waiting = modules(), {}, [module]
    while waiting:
        name = waiting.pop()
        while name and name not in known:
            name = name.rpartition(".")[0]  # `from .config import TrainConfig` names an attribute
        if not name or name in reached:
            continue
        now = imported_by(name)
        reached[name] = {item.top for item in now if not item.ours}
        waiting += [item.name for item in now if item.ours] + [name.rpartition(".")[0]]
    return reached


def test_the_layers_are_where_this_test_looks():
    found = modules()
    assert {"models.errors", "models.dco.loss", "trainers.dco"} <= found.keys()
    assert len(found) >= 10


def test_every_module_keeps_to_the_import_table():
    found = [line for path in modules().values() for line in complaints(str(path.relative_to(ROOT)), path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/x.py", "import diffusers"),
        ("models/x.py", "def f():\n    from ..trainers import config"),
        ("models/x.py", "from .. import nodes"),
        ("models/x.py", "import insightface"),
        ("models/faces.py", "import insightface"),
        ("models/dco/x.py", "import comfy.samplers"),
        ("models/dco/x.py", "from comfyui_personalize.models import errors"),
        ("trainers/x.py", "def f():\n    import folder_paths"),
        ("trainers/x.py", "from ..nodes.dco import TrainDCO"),
        ("trainers/x.py", "import bitsandbytes"),
        ("trainers/other/x.py", "from ..dco.train import train"),
        ("nodes/x.py", "def f():\n    import peft"),
        ("nodes/x.py", "from diffusers import UNet2DConditionModel"),
    ],
)
def test_the_table_names_what_breaks_it(path, source, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda self: self.name in ("dco", "other"))
    assert len(complaints(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/faces.py", "def f():\n    import insightface"),
        ("models/dco/x.py", "import math\nfrom ..errors import ConfigError\nfrom . import loss"),
        ("trainers/dco/x.py", "import peft\nfrom ...models.dco import dco_loss\nfrom ..loop import train_loop"),
        ("nodes/dco.py", "import folder_paths\nfrom comfy_api.latest import io\nfrom ..trainers.dco import config"),
    ],
)
def test_the_table_allows_what_it_should(path, source):
    assert complaints(path, source) == []


def test_the_entry_point_imports_nothing_until_it_is_called():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not list(item for item in imports_of(ast.unparse(tree), "") if not item.inside_function)
    assert any(isinstance(node, ast.AsyncFunctionDef) and node.name == "comfy_entrypoint" for node in tree.body)


@pytest.mark.parametrize("start", LIGHT)
def test_starting_comfyui_reaches_no_heavy_package(start):
    starts = [name for name in modules() if name == start or (start == "nodes" and name.startswith("nodes."))]
    assert starts, f"{start} is listed as light but does not exist"
    for name in starts:
        for module, outside in loaded_with(name).items():
            assert not outside & HEAVY, f"importing {name} loads {module}, which imports {sorted(outside & HEAVY)}"


def test_a_fresh_interpreter_agrees():
    present = [f"comfyui_personalize.{name}" for name in LIGHT if name != "nodes" and name in modules()]
    code = f"import sys, {', '.join(present)}; print(*sorted(sys.modules.keys() & {HEAVY!r}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    assert result.stdout.strip() == ""


def test_packaging_lists_every_package_and_nothing_else():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {".".join(("comfyui_personalize", *path.parent.relative_to(ROOT).parts)) for path in init_files()}
    assert sorted(listed) == sorted(on_disk | {"comfyui_personalize.workflows"})


def init_files() -> list[Path]:
    return [ROOT / "__init__.py", *(path for layer in LAYERS for path in (ROOT / layer).rglob("__init__.py"))]


def test_every_folder_with_modules_is_a_package():
    folders = {path.parent for path in modules().values()}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


def test_no_file_outgrows_its_subject():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in modules().values()}
    assert not {path: count for path, count in lines.items() if count > 500}


def test_tests_are_no_package():
    packages = {path.parent.name for path in (ROOT / "tests").rglob("__init__.py")}
    assert packages <= {"tinymodels"}, "only the extension that the host loads beside ours is a package"
