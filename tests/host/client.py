"""A small ComfyUI client: post a workflow, follow it over the websocket, cancel it, fetch what it made."""

from __future__ import annotations

import io
import json
import struct
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import requests
import websocket
from PIL import Image

PREVIEW_IMAGE, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # the host's numbers for binary messages (protocol.py)
ENDINGS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}

Graph = dict[str, dict[str, Any]]


class Rejected(Exception):  # noqa: N818 - it says what happened
    """The host refused a workflow before queueing it; `body` is its answer."""

    def __init__(self, body: dict):
        super().__init__(json.dumps(body, indent=1))
        self.body = body

    @property
    def messages(self) -> list[str]:
        """Every sentence in the answer: the general one, then those of the single nodes."""
        nodes = self.body.get("node_errors") or {}
        errors = [self.body["error"], *(error for node in nodes.values() for error in node["errors"])]
        return [f"{error['message']}: {error.get('details', '')}" for error in errors]


@dataclass
class Run:
    """What one workflow did. `events` are (type, data) in order of arrival, `seconds` from posting to the end."""

    prompt_id: str
    status: str = "running"
    events: list[tuple[str, dict]] = field(default_factory=list)
    previews: list[Image.Image] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)
    error: dict | None = None
    outputs: dict[str, dict] = field(default_factory=dict)
    seconds: float = 0.0

    def of_type(self, kind: str) -> list[dict]:
        return [data for name, data in self.events if name == kind]

    def progress(self, node: str | None = None) -> list[tuple[float, float]]:
        """(value, maximum) of each progress message, of one node or of all."""
        return [(data["value"], data["max"]) for data in self.of_type("progress") if node in (None, data["node"])]

    @property
    def cached_nodes(self) -> set[str]:
        return {node for data in self.of_type("execution_cached") for node in data["nodes"]}


class Client:
    """One client of a running server; close it, or use it as a context manager.

    Args:
        url: such as http://127.0.0.1:8188.
        timeout: seconds allowed for one HTTP request, and for a workflow unless `run` is told otherwise.
    """

    def __init__(self, url: str, timeout: float = 120.0):
        self.url = url
        self.timeout = timeout
        self.client_id = uuid.uuid4().hex
        self.http = requests.Session()
        self.http.trust_env = False  # a proxy from the environment must not come between two local processes
        self.socket = websocket.create_connection(
            f"{url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}", timeout=timeout, http_no_proxy=["127.0.0.1"]
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self.http.close()

    def run(
        self,
        graph: Graph,
        *,
        timeout: float | None = None,
        on_event: Callable[[str, dict], None] | None = None,
        workflow: dict | None = None,
    ) -> Run:
        """Post a graph in API format and follow it to its end; `on_event` hears (type, data) and may cancel.

        Raises:
            Rejected: the host found the graph invalid.
            TimeoutError: it had not ended after `timeout` seconds.
        """
        return self.follow(self.post(graph, workflow=workflow), timeout=timeout, on_event=on_event)

    def post(self, graph: Graph, *, workflow: dict | None = None) -> str:
        """Queue a graph in API format and return its prompt id; see `run`."""
        body: dict[str, Any] = {"prompt": graph, "client_id": self.client_id}
        if workflow is not None:
            body["extra_data"] = {"extra_pnginfo": {"workflow": workflow}}
        reply = self.http.post(f"{self.url}/prompt", json=body, timeout=self.timeout)
        if reply.status_code == 400:
            raise Rejected(reply.json())
        reply.raise_for_status()
        return reply.json()["prompt_id"]

    def follow(
        self, prompt_id: str, *, timeout: float | None = None, on_event: Callable[[str, dict], None] | None = None
    ) -> Run:
        """Collect the messages of a queued prompt until it ends; messages of others are passed over."""
        run, started = Run(prompt_id), time.monotonic()
        for kind, data in self._messages(run, started + (timeout or self.timeout)):
            if data.get("prompt_id", prompt_id) != prompt_id:
                continue
            run.events.append((kind, data))
            if on_event is not None:
                on_event(kind, data)
            if kind in ENDINGS and data.get("prompt_id") == prompt_id:
                run.status = ENDINGS[kind]
                run.error = data if run.status == "error" else None
                break
        run.seconds = time.monotonic() - started
        run.outputs = self._await_history(prompt_id).get("outputs", {})
        return run

    def interrupt(self) -> None:
        """Cancel what is running now."""
        self._post("/interrupt", {})

    def clear_queue(self) -> None:
        """Forget what waits."""
        self._post("/queue", {"clear": True})

    def free(self) -> None:
        """Ask the host to unload all models and forget its cached results; it does so when next idle."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def queue(self) -> dict:
        return self._get("/queue").json()

    def history(self, prompt_id: str) -> dict:
        """The host's record of a finished prompt, {} when there is none."""
        return self._get(f"/history/{prompt_id}").json().get(prompt_id, {})

    def object_info(self, node: str | None = None) -> dict:
        """The host's description of every node, or of one ({} when it has no such node)."""
        return self._get(f"/object_info/{node}").json().get(node, {}) if node else self._get("/object_info").json()

    def images(self, run: Run, node: str | None = None) -> list[Image.Image]:
        """The pictures among a run's outputs, of one node or of all."""
        entries = [
            entry for name, output in run.outputs.items() if node in (None, name) for entry in output.get("images", [])
        ]
        return [Image.open(io.BytesIO(self.view(**entry))) for entry in entries]

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        return self._get(f"/view?{query}").content

    def upload(self, picture: Image.Image | bytes, name: str, subfolder: str = "") -> str:
        """Put a picture into the host's input folder; return its name as the host's nodes expect it."""
        if isinstance(picture, Image.Image):
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            picture = buffer.getvalue()
        reply = self.http.post(
            f"{self.url}/upload/image",
            files={"image": (name, picture)},
            data={"subfolder": subfolder, "type": "input", "overwrite": "true"},
            timeout=self.timeout,
        )
        reply.raise_for_status()
        stored = reply.json()
        return f"{stored['subfolder']}/{stored['name']}" if stored["subfolder"] else stored["name"]

    def wait_until_idle(self, timeout: float = 30.0) -> None:
        """Return when nothing runs or waits.

        Raises:
            TimeoutError: something still did after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            queue = self.queue()
            if not queue["queue_running"] and not queue["queue_pending"]:
                return
            time.sleep(0.05)
        raise TimeoutError(f"the host's queue was not empty after {timeout:.0f} s")

    def _messages(self, run: Run, deadline: float) -> Iterator[tuple[str, dict]]:
        while (left := deadline - time.monotonic()) > 0:
            self.socket.settimeout(left)
            try:
                message = self.socket.recv()
            except websocket.WebSocketTimeoutException:
                break
            if isinstance(message, bytes):
                texts = len(run.texts)
                _read_binary(message, run)
                for node, text in run.texts[texts:]:
                    yield "progress_text", {"node": node, "text": text}
            elif message:
                event = json.loads(message)
                yield event["type"], event["data"]
        raise TimeoutError(f"prompt {run.prompt_id} had not ended in time; last messages: {run.events[-3:]}")

    def _await_history(self, prompt_id: str, timeout: float = 5.0) -> dict:
        # The last message is sent slightly before the record exists.
        deadline = time.monotonic() + timeout
        while not (entry := self.history(prompt_id)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return entry

    def _get(self, path: str) -> requests.Response:
        reply = self.http.get(self.url + path, timeout=self.timeout)
        reply.raise_for_status()
        return reply

    def _post(self, path: str, body: dict) -> None:
        self.http.post(self.url + path, json=body, timeout=self.timeout).raise_for_status()


def _read_binary(message: bytes, run: Run) -> None:
    kind, payload = struct.unpack(">I", message[:4])[0], message[4:]
    if kind == PREVIEW_IMAGE:  # 4 bytes of picture format, then the picture
        run.previews.append(Image.open(io.BytesIO(payload[4:])))
    elif kind == PREVIEW_WITH_METADATA:
        length = struct.unpack(">I", payload[:4])[0]
        run.previews.append(Image.open(io.BytesIO(payload[4 + length :])))
    elif kind == TEXT:
        length = struct.unpack(">I", payload[:4])[0]
        run.texts.append((payload[4 : 4 + length].decode(), payload[4 + length :].decode()))
