"""The tiers of the test run: each folder's marker, and what was not run said so that nobody overlooks it."""

import importlib.util
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
MARKED_FOLDERS = ("parity", "host", "browser")
LOUD = ("host", "browser")


def _load_helper(path: str):
    """Import a helper module by its path below tests/, once."""
    name = "personalize_tests_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TESTS / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# transformers imports torchvision where the host's requirements brought it along.
_load_helper("host/boot.py").declare_missing_torchvision_operators()


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.is_relative_to(TESTS) and (folder := item.path.relative_to(TESTS).parts[0]) in MARKED_FOLDERS:
            item.add_marker(folder)


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    for tier in LOUD:
        # The report of a module that was skipped as a whole has a path, but no keywords.
        path = f"tests/{tier}/"
        reports = [report for report in skipped if path in report.nodeid or tier in getattr(report, "keywords", ())]
        if reports:
            reasons = "; ".join(sorted({str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports}))
            sentence = f"{tier.upper()} TESTS WERE SKIPPED: {len(reports)} NOT RUN ({reasons})"
            terminalreporter.write_line(sentence, yellow=True, bold=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        for server in _load_helper("host/server.py").running:
            report.sections.append((f"log of the ComfyUI at {server.url}", server.log_tail()))
    return report


@pytest.fixture(scope="session")
def load_helper():
    """Import a helper module by its path below tests/, such as "host/client.py"; tests/ is no package."""
    return _load_helper


@pytest.fixture(scope="session")
def comfyui():
    """The ComfyUI checkout; tests that need one are skipped where there is none."""
    path = _load_helper("tiny/find_host.py").find_comfyui()
    if path is None:
        pytest.skip("no ComfyUI found; set COMFYUI_PATH")
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """family ("sd15", "sd21", "sdxl") -> path of a tiny single-file checkpoint, written on first use; read only."""
    folder = tmp_path_factory.mktemp("tiny")

    def path_of(family):
        path = folder / f"tiny_{family}.safetensors"
        return path if path.exists() else _load_helper("tiny/checkpoints.py").write_tiny_checkpoint(family, path)

    return path_of


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """A folder with a tiny CLIP with random weights, without a tokenizer, as transformers saves it; read only."""
    return _load_helper("tiny/judges.py").write_clip(tmp_path_factory.mktemp("judges") / "tiny_clip")


@pytest.fixture(scope="session")
def make_server(comfyui, tiny_checkpoint):
    """make_server(base, **options) -> a ComfyUI that is not started yet, with the three tiny checkpoints."""
    checkpoints = {path.name: path for path in map(tiny_checkpoint, ("sd15", "sd21", "sdxl"))}

    def make(base, **options):
        return _load_helper("host/server.py").Server(comfyui, base, checkpoints=checkpoints, **options)

    return make


@pytest.fixture(scope="session")
def comfy_server(make_server, tmp_path_factory):
    """The one ComfyUI that most host and browser tests share, running."""
    with make_server(tmp_path_factory.mktemp("comfyui")) as server:
        yield server


@pytest.fixture
def client(comfy_server):
    """A client of the shared server; whatever it left running or waiting is cancelled afterwards."""
    with _load_helper("host/client.py").Client(comfy_server.url) as client:
        yield client
        client.clear_queue()
        client.interrupt()
        client.wait_until_idle()
