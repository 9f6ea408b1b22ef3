"""A real ComfyUI in a process of its own: only this extension and the tiny model sizes, its own folders, loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
EXTENSION_FOLDER = "comfyui-personalize"
TINY_MODELS_FOLDER = "tinymodels"

running: list[Server] = []


class Server:
    """Start, watch and stop one ComfyUI; a context manager, or `start()` and `stop()`.

    Args:
        comfyui: the checkout whose main.py runs, with this Python.
        base: the folder that becomes the host's base directory; used again, it is a restart with the same files.
        checkpoints: file name -> file, linked into models/checkpoints.
        arguments: more options of main.py.
        environment: variables added to this process's own.
    """

    def __init__(
        self,
        comfyui: Path,
        base: Path,
        *,
        checkpoints: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ):
        self.comfyui = comfyui
        self.base = base.resolve()
        self.checkpoints = dict(checkpoints or {})
        self.arguments = list(arguments)
        self.environment = dict(environment or {})
        self.port = 0
        self.process: subprocess.Popen | None = None
        self.log_file = self.base / "comfyui.log"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info) -> None:
        self.stop()

    def start(self, timeout: float = 120.0) -> Self:
        """Return once the server answers.

        Raises:
            RuntimeError: it stopped by itself or did not answer within `timeout` seconds; the message holds its log.
        """
        self._prepare_folders()
        self.port = _free_port()
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.base,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        running.append(self)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self.stop()
                raise RuntimeError(f"ComfyUI stopped with status {self.process.returncode}:\n{self.log_tail()}")
            if self._answers():
                return self
            time.sleep(0.1)
        self.stop()
        raise RuntimeError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")

    def stop(self, timeout: float = 20.0) -> None:
        """End the process, politely first; does nothing when it has ended."""
        if self in running:
            running.remove(self)
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End the process as a power cut would."""
        if self in running:
            running.remove(self)
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def log(self) -> str:
        """All that the host printed, including earlier starts on the same base folder."""
        return self.log_file.read_text(errors="replace") if self.log_file.exists() else ""

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    def _command(self) -> list[str]:
        options = {
            "--listen": "127.0.0.1",
            "--port": str(self.port),
            "--base-directory": str(self.base),
            "--database-url": f"sqlite:///{self.base}/user/comfyui.db",
            "--preview-method": "auto",
        }
        return [
            sys.executable,
            str(HERE / "boot.py"),
            str(self.comfyui),
            "--cpu",
            *(word for option in options.items() for word in option),
            "--disable-auto-launch",
            "--disable-api-nodes",
            "--disable-all-custom-nodes",
            *("--whitelist-custom-nodes", EXTENSION_FOLDER, TINY_MODELS_FOLDER),
            *self.arguments,
        ]

    def _prepare_folders(self) -> None:
        links = {
            f"custom_nodes/{EXTENSION_FOLDER}": PROJECT,
            f"custom_nodes/{TINY_MODELS_FOLDER}": HERE / TINY_MODELS_FOLDER,
        } | {f"models/checkpoints/{name}": path for name, path in self.checkpoints.items()}
        for folder in ("custom_nodes", "models/checkpoints", "user", "input", "output"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for link, target in links.items():
            if not (self.base / link).exists():
                (self.base / link).symlink_to(target.resolve(), target_is_directory=target.is_dir())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
