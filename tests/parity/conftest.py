"""Comparison with recorded output of the authors' code: every case file is loaded, claimed by a test and used up.

A test claims cases with ``@pytest.mark.golden(system, pattern, ...)`` and takes the fixture ``case``. It then has to
compare every recorded output; with ``whole=False`` it only borrows the case for another purpose.
``GOLDEN_DIR`` names another folder of the same layout, whose cases may have other seeds, shapes and settings.
"""

import ast
import json
import os
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

HERE = Path(__file__).parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR") or HERE / "data")
COMPARED = "parity_compared"


class Case:
    """One recorded case. Metadata names what was computed, from which file, with which settings and tolerances."""

    def __init__(self, path: Path, compared: list[tuple[float, str]]):
        self.path = path
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["case"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        self.config = self.meta["config"]
        if "atol_by_tensor" not in self.meta:
            _widen(tensors)
        self.inputs, self.expected = _part(tensors, "in."), _part(tensors, "out.")
        self.weights, self.background = _part(tensors, "w."), _part(tensors, "info.")
        for key, scale in self.config.get("weight_scale", {}).items():
            self.weights[key] = self.weights[key].float() * np.float32(scale)
        self.unchecked = set(self.expected)
        self._compared = compared

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.stem}"

    def sibling(self, name: str) -> "Case":
        """Another case of the same system, such as the one that holds shared weights."""
        return Case(self.path.with_name(f"{name}.safetensors"), self._compared)

    def file(self, name: str) -> Path:
        """A companion file, by the path that the settings give."""
        return self.path.parent / name

    def check(self, name: str, got: torch.Tensor) -> None:
        """Fail unless ``got`` is output ``name`` within that tensor's own recorded tolerance; 0 means equal."""
        self._compare(name, got, self.expected[name], self._tolerance(name))
        self.unchecked.discard(name)

    def check_background(self, name: str, got: torch.Tensor) -> None:
        """The same for a value that our own default has in place of the authors'."""
        expected = self.background[name]
        self._compare(name, got, expected, self.meta["rtol"] * expected.abs().max().item())

    def _tolerance(self, name: str) -> torch.Tensor:
        """Recorded per tensor, or as an absolute and a relative part that make one per element."""
        if "atol_by_tensor" in self.meta:
            return torch.tensor(self.meta["atol_by_tensor"][f"out.{name}"], dtype=torch.float64)
        absolute = self.config.get("atol_per_tensor", {}).get(name, self.meta["atol"])
        return absolute + self.meta["rtol"] * self.expected[name].double().abs()

    def _compare(self, name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float | torch.Tensor) -> None:
        got = torch.as_tensor(got).detach().cpu()
        where = f"{self.name}: {name}"
        assert got.shape == expected.shape, f"{where} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            assert torch.equal(got.to(expected.dtype), expected), f"{where} differs"
            return
        if not expected.numel():
            return
        error, tolerance = torch.broadcast_tensors((got.double() - expected.double()).abs(), torch.as_tensor(tolerance))
        worst = (error - tolerance).argmax()
        off, allowed = error.flatten()[worst].item(), tolerance.flatten()[worst].item()
        assert (error <= tolerance).all(), f"{where} is off by {off:.3e}, allowed {allowed:.3e}"
        if (tolerance > 0).all():
            self._compared.append(((error / tolerance).max().item(), where))


def _widen(tensors: dict[str, torch.Tensor]) -> None:
    """Make float32 of float16, and of int8 weights, whose powers of two follow the sorted order of their names."""
    exponents = tensors.pop("w_exp", torch.tensor([])).tolist()
    weights = sorted(key for key, value in tensors.items() if key.startswith("w.") and value.dtype == torch.int8)
    scales = dict(zip(weights, exponents, strict=True))
    for key, value in tensors.items():
        if key in scales or value.dtype == torch.float16:
            tensors[key] = value.float() * 2.0 ** scales.get(key, 0)


def _part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def cases(system: str, patterns: tuple[str, ...] = ("*",)) -> list[Path]:
    """Case files of ``system`` whose name fits one of ``patterns``."""
    files = sorted((GOLDEN / system).glob("*.safetensors"))
    return [path for path in files if any(fnmatchcase(path.stem, pattern) for pattern in patterns)]


def claims(source: str) -> list[tuple[str, tuple[str, ...]]]:
    """System and patterns of every claim in a test module.

    Read from the text, so that the answer is the same whichever tests a run selects.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        for decorator in node.decorator_list:
            if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) != "pytest.mark.golden":
                continue
            if any(keyword.arg == "whole" and not ast.literal_eval(keyword.value) for keyword in decorator.keywords):
                continue
            system, *patterns = (ast.literal_eval(argument) for argument in decorator.args)
            found.append((system, tuple(patterns)))
    return found


def complaints(system: str) -> list[str]:
    """What is wrong between the case files of ``system`` and the tests that claim them."""
    found = [claim for path in sorted((HERE / system).rglob("test_*.py")) for claim in claims(path.read_text())]
    patterns = [pattern for owner, owned in found if owner == system for pattern in owned]
    unclaimed = [path.name for path in cases(system) if not any(fnmatchcase(path.stem, one) for one in patterns)]
    lines = [f"no test consumes {system}/{name}" for name in unclaimed]
    if GOLDEN == HERE / "data":
        absent = [pattern for pattern in patterns if not cases(system, (pattern,))]
        lines += [f"a test claims {system}/{pattern}, which was never recorded" for pattern in absent]
    return lines


class Consumption(pytest.Item):
    """Fails when a case file of one system is claimed by no test."""

    def __init__(self, *, system: str, **rest):
        super().__init__(**rest)
        self.system = system
        self.add_marker("parity")

    def runtest(self) -> None:
        if found := complaints(self.system):
            raise LookupError("\n".join(found))

    def repr_failure(self, excinfo, style=None) -> str:
        return str(excinfo.value)

    def reportinfo(self):
        return HERE / self.system, None, self.name


def pytest_configure(config):
    config.addinivalue_line("markers", "golden(system, *patterns, whole=True): consumes recorded cases")


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None:
        return
    system, *patterns = marker.args
    files = cases(system, tuple(patterns))
    metafunc.parametrize("case", files, indirect=True, ids=[f"{system}/{path.stem}" for path in files])


@pytest.hookimpl(tryfirst=True)  # before -k and -m, which may then deselect the check like any other test
def pytest_collection_modifyitems(session, items):
    systems = set()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("parity")
        if marker := item.get_closest_marker("golden"):
            systems.add(marker.args[0])
    for system in sorted(systems):
        items.append(
            Consumption.from_parent(session, name=f"{system}/every_case_is_consumed", system=system, path=HERE / system)
        )


@pytest.fixture
def case(request) -> Case:
    """The recorded case that a test is parametrized with; what it compared travels with the test's report."""
    compared: list[tuple[float, str]] = []
    request.node.user_properties.append((COMPARED, compared))
    return Case(request.param, compared)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    result = yield
    marker = pyfuncitem.get_closest_marker("golden")
    if marker is not None and marker.kwargs.get("whole", True):
        left = sorted(pyfuncitem.funcargs["case"].unchecked)
        assert not left, f"recorded outputs that the test never compared: {left}"
    return result


def pytest_terminal_summary(terminalreporter):
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    properties = [entry for report in reports if report.when == "call" for entry in report.user_properties]
    if compared := [tuple(pair) for name, pairs in properties if name == COMPARED for pair in pairs]:
        worst, where = max(compared)
        terminalreporter.write_line(
            f"parity: {len(compared)} tensors compared with recorded ones; "
            f"the largest error is {worst:.1%} of its tolerance ({where})"
        )
