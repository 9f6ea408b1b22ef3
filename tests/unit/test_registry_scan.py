"""The archive that the registry would scan: small, without tests, and without anything that raises a flag there."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN_IMPORTS = {
    "ctypes",
    "ftplib",
    "http",
    "httpx",
    "imp",
    "importlib",
    "marshal",
    "pickle",
    "pip",
    "pty",
    "requests",
    "shelve",
    "socket",
    "subprocess",
    "telnetlib",
    "urllib",
    "urllib3",
    "webbrowser",
}
ALLOWED = {
    # The command line imports, relatively, a module of ours that a literal table names.
    "trainers/__main__.py": ["imports importlib"],
    # Custom Diffusion's own programs read no other file than delta.bin; tensors alone are written.
    "models/formats.py": ["torch.save("],
}
# A scan greps text, so comments and messages count too.
TRIPWIRES = [
    r"\bos\.(environ|getenv|putenv|system|popen|spawn\w*|exec\w*)\b",
    r"(?<![\w.])(eval|exec|compile|__import__)\(",
    r"\bweights_only\s*=\s*False\b",
    r"\bpickle\.\w+\(",
    r"\bpip3?\s+install\b",
    r"\btorch\.save\(",
    r"\b(base64|codecs)\.\w*decode\(",
    r"\bshell\s*=\s*True\b",
    r"https?://(?!arxiv\.org/|github\.com/)",
]
LARGEST_FILE = 1_000_000  # bytes
LARGEST_ARCHIVE = 5_000_000  # bytes


def git(*arguments: str) -> list[str]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in result.stdout.split("\0") if name]


@cache
def archive() -> tuple[str, ...]:
    """What is tracked, minus .comfyignore (git reads its patterns with the same meaning)."""
    if not (ROOT / ".git").exists():
        pytest.skip("the archive is made from a git checkout")
    ignored = set(git("--ignored", "--exclude-from=.comfyignore"))
    return tuple(name for name in git() if name not in ignored and (ROOT / name).is_file())


def modules() -> dict[str, str]:
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in archive() if name.endswith(".py")}


def imported(source: str) -> set[str]:
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}


def flags(source: str) -> list[str]:
    """What a scan would remark on in `source`."""
    found = [f"imports {name}" for name in sorted(imported(source) & FORBIDDEN_IMPORTS)]
    return found + [match.group() for pattern in TRIPWIRES for match in re.finditer(pattern, source)]


def test_the_archive_holds_the_extension():
    needed = {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "README.md", "CHANGELOG.md"}
    assert needed <= set(archive())
    assert {"models/errors.py", "nodes/__init__.py", "trainers/registry.py"} <= set(archive())
    assert any(name.startswith("workflows/") for name in archive())


def test_the_archive_holds_nothing_else():
    outside = re.compile(r"(^|/)(tests?|benchmarks|scripts|demo|docs_src|\.[^/]+)(/|$)|(^|/)(test_|conftest)|Makefile")
    assert [name for name in archive() if outside.search(name)] == []
    expected = {"", ".py", ".md", ".txt", ".toml", ".json", ".jpg", ".png"}
    assert {Path(name).suffix for name in archive()} <= expected


def test_no_module_raises_a_flag():
    raised = {name: found for name, source in modules().items() if (found := flags(source))}
    assert {name: found for name, found in raised.items() if found != ALLOWED.get(name)} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import requests",
        "from urllib.request import urlopen",
        "def f():\n    import subprocess",
        "import pickle",
        "import os\nos.environ['A'] = 'b'",
        "import os\nos.system('x')",
        "eval('1')",
        "exec('1')",
        "torch.load(path, weights_only=False)",
        "raise ImportError('run pip install x')",
        "ADDRESS = 'https://example.com/model'",
    ],
)
def test_the_scan_sees(source):
    assert len(flags(source)) == 1


@pytest.mark.parametrize("source", ["model.eval()", "import os\nos.replace(a, b)", "# see https://arxiv.org/abs/1"])
def test_the_scan_lets_pass(source):
    assert flags(source) == []


def test_files_are_small_and_text_is_readable_everywhere():
    sizes = {name: (ROOT / name).stat().st_size for name in archive()}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE} == {}
    assert sum(sizes.values()) < LARGEST_ARCHIVE
    assert [name for name, source in modules().items() if "\r" in source or "\t" in source] == []


def test_the_registrys_own_lint_passes():
    files = sorted(modules())
    assert len(files) >= 10
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--select", "S102,S307,E702"]
    result = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=False)
    if "No module named ruff" in result.stderr:
        pytest.skip("ruff is not installed")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_archive_holds_what_the_page_shows():
    shown = {
        str(path.relative_to(ROOT))
        for pattern in ("web/docs/*.md", "workflows/*.json", "workflows/*.jpg", "locales/*/*.json")
        for path in ROOT.glob(pattern)
    }
    assert shown and sorted(shown - set(archive())) == []
