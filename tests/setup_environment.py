"""Create the virtual environment of `make demo` and `make test`; standard library only.

When a ComfyUI is found, its own requirements are installed too, so that the demo and the host tests can start it.
Where none is found, --clone-comfyui tries to clone the release that the tests are pinned to, before anything is
installed. Running again is cheap: a stamp in the environment names what was installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
COMFYUI_REPOSITORY, COMFYUI_RELEASE = "https://github.com/comfyanonymous/ComfyUI", "v0.10.0"
CLONE_SECONDS = 30
MINIMUM = (3, 11)
STAMP = "personalize-installed.txt"
FACE_NEEDS = ("onnx", "onnxruntime", "opencv-python-headless", "requests", "scikit-image", "scipy", "tqdm")
TORCH_FAMILY = re.compile(r"^(torch|torchvision|torchaudio)\b(?!-)", re.IGNORECASE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment (default: .venv)")
    parser.add_argument("--clone-comfyui", action="store_true", help="clone ComfyUI where there is none")
    arguments = parser.parse_args()
    venv = arguments.venv.expanduser().absolute()

    if sys.version_info < MINIMUM:
        return _refuse(
            f"Python {MINIMUM[0]}.{MINIMUM[1]} or newer is needed, {sys.executable} is {sys.version.split()[0]}; "
            "name another one, for example: make test PYTHON=python3.12"
        )
    try:
        host = find_comfyui()
    except FileNotFoundError as error:
        return _refuse(str(error))
    if host is None and arguments.clone_comfyui:
        host = clone_comfyui()
    wanted = fingerprint(host)
    stamp = venv / STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return 0
    try:
        install(venv, host)
    except subprocess.CalledProcessError as error:
        return _refuse(f"set-up stopped: `{' '.join(map(str, error.cmd))}` failed with status {error.returncode}")
    stamp.write_text(wanted, encoding="utf-8")
    print(f"The environment in {venv} is ready.", flush=True)
    return 0


def find_comfyui() -> Path | None:
    """The host that the demo and the tests will use; the decision itself is made in tests/tiny/find_host.py."""
    spec = importlib.util.spec_from_file_location("find_host", ROOT / "tests" / "tiny" / "find_host.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.find_comfyui()


def clone_comfyui() -> Path | None:
    """Clone the pinned release into ComfyUI/ in this project, complete or not at all; None, and why, without it."""
    target = ROOT / "ComfyUI"
    partial = ROOT / "ComfyUI.partial"
    shutil.rmtree(partial, ignore_errors=True)
    command = ["git", "clone", "--quiet", "--depth", "1", "--branch", COMFYUI_RELEASE, COMFYUI_REPOSITORY, str(partial)]
    environment = os.environ | {"GIT_TERMINAL_PROMPT": "0"}
    try:
        options = {"check": True, "capture_output": True, "text": True, "timeout": CLONE_SECONDS}
        subprocess.run(command, env=environment, **options)
        partial.rename(target)
        return target
    except subprocess.TimeoutExpired:
        reason = f"not done after {CLONE_SECONDS} s"
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.startswith("fatal:")]
        reason = said[0].removeprefix("fatal:").strip() if said else f"status {error.returncode}"
    except OSError as error:
        reason = str(error)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"No ComfyUI found, and cloning {COMFYUI_RELEASE} failed ({reason}): going on without one.", flush=True)
    return None


def fingerprint(host: Path | None) -> str:
    """Hash of everything that decides what gets installed, and where the editable install points."""
    digest = hashlib.sha256(str(ROOT).encode())
    files = [Path(__file__), CONSTRAINTS, ROOT / "pyproject.toml", ROOT / "requirements.txt"]
    for path in files + ([host / "requirements.txt"] if host else []):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def install(venv: Path, host: Path | None) -> None:
    """Make `venv` hold the package (editable), the test tools and what the host needs.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; their own words are on the terminal.
    """
    python = venv / "bin" / "python"
    if not python.exists():
        _say(f"Creating {venv}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    pip += ["--no-compile"]  # half of the time would go into modules that are never imported

    _say("Installing torch (the largest part)")
    subprocess.run([*pip, "torch"], check=True)
    if host:  # it imports torchvision, whose wheel must not bring another build of torch with it
        subprocess.run([*pip, "--no-deps", "torchvision"], check=True)

    arguments = ["-e", f"{ROOT}[test]"]
    with tempfile.TemporaryDirectory() as folder:
        if host:
            requirements = Path(folder) / "host-requirements.txt"
            requirements.write_text(host_requirements(host), encoding="utf-8")
            arguments += ["-r", str(requirements)]
        _say("Installing the package and the test tools" + (f", and what {host} needs" if host else ""))
        subprocess.run([*pip, *arguments], check=True)
    # Only the merges file inside it is read, so what it would need to be imported stays away.
    subprocess.run([*pip, "--no-deps", "open_clip_torch"], check=True)
    install_faces(pip)


def install_faces(pip: list[str]) -> None:
    """Install what the extra "face" needs, as wheels; where there are none, the tests of faces are skipped.

    Its own choice of OpenCV needs a desktop's libraries, the headless one has the same functions.
    """
    binary = [*pip, "--only-binary", ":all:"]
    commands = [*binary, *FACE_NEEDS], [*binary, "--no-deps", "insightface"]
    if any(subprocess.run(command, check=False).returncode for command in commands):
        print("insightface could not be installed: going on without the tests of faces.", flush=True)


def host_requirements(host: Path) -> str:
    """The host's requirements without torch's family, which is installed already.

    It also imports `requests` without declaring it; that comes with our own test tools.
    """
    lines = (host / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join([line for line in lines if not TORCH_FAMILY.match(line.strip())] + [""])


def _say(sentence: str) -> None:
    print(f"{sentence} ...", flush=True)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
