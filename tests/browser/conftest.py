"""Fixtures of tests in the host's own page, opened in a real Chromium."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM_OPTIONS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# A fresh profile asks for these optional files, and the page copes with their absence.
EXPECTED_MISSING = ("user.css", "userdata", "templates", "favicon", "subgraphs", "/i18n", "comfy.templates.json")
SETTLE_MS = 1500  # start-up also opens a default graph, a little after the page looks ready

READY = "() => window.app?.graph && window.app?.api && window.LiteGraph?.registered_node_types?.KSampler"
ALL_NODES = "[...app.graph._nodes]"
MISSING_NODES = f"() => {ALL_NODES}.filter(n => !LiteGraph.registered_node_types[n.type]).map(n => n.type)"
RED_WIDGETS = f"""() => {ALL_NODES}.flatMap(node => (node.widgets ?? []).flatMap(widget => {{
    if (widget.type !== "combo") return [];
    const listed = widget.options?.values;
    const values = typeof listed === "function" ? listed(widget, node) : listed ?? [];
    const allowed = Array.isArray(values) ? values : Object.keys(values);
    return allowed.includes(widget.value) ? [] : [`${{node.type}}.${{widget.name}} = ${{widget.value}}`];
}}))"""
NODE_ERRORS = f"""() => ({{
    marked: {ALL_NODES}.filter(node => node.has_errors).map(node => node.type),
    refused: app.lastNodeErrors ?? {{}},
}})"""
QUEUE = """async () => {
    window.personalizeRun = {progress: 0};
    const endings = {execution_success: "success", execution_error: "error", execution_interrupted: "interrupted"};
    const heard = [];
    const listen = (name, react) => { app.api.addEventListener(name, react); heard.push([name, react]); };
    listen("progress", () => { window.personalizeRun.progress += 1; });
    for (const [name, status] of Object.entries(endings)) listen(name, event => {
        Object.assign(window.personalizeRun, {status, detail: event.detail});
        for (const [other, react] of heard) app.api.removeEventListener(other, react);
    });
    await app.queuePrompt(0, 1);
}"""


class Frontend:
    """The host's page: `page` is Playwright's, the methods say what a workflow looks like and does in it.

    `console_errors` gathers the errors that the open page printed, `foreign_requests` what it wanted from elsewhere
    (nothing leaves this machine: such requests are cut off).
    """

    def __init__(self, page, url: str):
        self.page = page
        self.url = url
        self.console_errors: list[str] = []
        self.foreign_requests: list[str] = []
        page.on("console", self._note_console)
        page.on("pageerror", lambda error: self.console_errors.append(error.stack or str(error)))
        page.route(lambda address: not address.startswith((url, "data:", "blob:")), self._cut_off)

    def open(self, timeout: float = 60.0) -> None:
        """Open the page and return when its graph can be used."""
        for name in ("Comfy.TutorialCompleted", "Comfy.Workflow.ShowMissingModelsWarning"):
            value = name == "Comfy.TutorialCompleted"
            requests.post(f"{self.url}/settings/{name}", json=value, timeout=30).raise_for_status()
        # The page reads the whole history, and cannot when a test has run a graph with NaN in it.
        requests.post(f"{self.url}/history", json={"clear": True}, timeout=30).raise_for_status()
        self.page.goto(self.url, wait_until="domcontentloaded", timeout=timeout * 1000)
        self.page.wait_for_function(READY, timeout=timeout * 1000)
        self.page.wait_for_timeout(SETTLE_MS)
        # The page of ComfyUI 0.3.64 prints an error of its own while it starts; this extension has no script in it.
        self.console_errors.clear()

    def load(self, workflow: dict | Path) -> None:
        """Show a workflow in the page's own format, given as a dict or a file."""
        workflow = json.loads(workflow.read_text(encoding="utf-8")) if isinstance(workflow, Path) else workflow
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.wait_for_timeout(300)

    def load_api(self, graph: dict) -> None:
        """Show a graph in API format; the page arranges it and makes its seeds fixed."""
        self.page.evaluate("graph => app.loadApiJson(graph, 'graph')", graph)
        self.page.evaluate(
            f"""() => {ALL_NODES}.forEach(node => (node.widgets ?? []).forEach(widget => {{
                if (widget.name === "control_after_generate") widget.value = "fixed";
            }}))"""
        )
        self.page.wait_for_timeout(300)

    def nodes(self) -> list[str]:
        """The types of the nodes shown."""
        return self.page.evaluate(f"() => {ALL_NODES}.map(node => node.type)")

    def missing_nodes(self) -> list[str]:
        """Types of shown nodes that the host does not have."""
        return self.page.evaluate(MISSING_NODES)

    def red_widgets(self) -> list[str]:
        """Lists whose chosen value is not on offer, as "Node.widget = value"."""
        return self.page.evaluate(RED_WIDGETS)

    def node_errors(self) -> dict:
        """`marked`: types of nodes drawn as faulty; `refused`: the host's node errors at the last queueing."""
        return self.page.evaluate(NODE_ERRORS)

    def widget(self, node: str, name: str):
        """The value of a widget of the first node of that type."""
        return self.page.evaluate(
            f"([node, name]) => {ALL_NODES}.find(n => n.type === node).widgets.find(w => w.name === name).value",
            [node, name],
        )

    def export_api(self) -> dict:
        """The shown graph in API format, as the page would queue it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def export_workflow(self) -> dict:
        """The shown graph in the page's own format."""
        return self.page.evaluate("() => app.graph.serialize()")

    def queue(self, timeout: float = 120.0) -> dict:
        """Press Run and wait; {"status": "success" | "error" | "interrupted", "detail", "progress": messages seen}.

        Raises:
            AssertionError: the host refused the graph.
        """
        self.page.evaluate(QUEUE)
        refused = self.node_errors()["refused"]
        assert not refused, refused
        self.page.wait_for_function("() => window.personalizeRun.status", timeout=timeout * 1000)
        return self.page.evaluate("() => window.personalizeRun")

    def screenshot(self, path: Path, settle: float = 1.5) -> Path:
        """Save a picture of the whole window, after `settle` seconds for pictures in nodes to appear."""
        self.page.wait_for_timeout(settle * 1000)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=path)
        return path

    def _note_console(self, message) -> None:
        address = (message.location or {}).get("url", "")
        expected = any(part in address for part in EXPECTED_MISSING) or address.endswith(".jpg")
        if message.type == "error" and not expected:
            self.console_errors.append(f"{message.text} ({address})")

    def _cut_off(self, route) -> None:
        self.foreign_requests.append(route.request.url)
        route.abort()


@pytest.fixture(scope="session")
def chromium():
    """A running headless Chromium with an empty profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium found on PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, headless=True, args=list(CHROMIUM_OPTIONS))
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def open_frontend(chromium):
    """open_frontend(url): a context with a server's page, open and ready."""

    @contextmanager
    def open_page(url):
        context = chromium.new_context(viewport={"width": 1600, "height": 900})
        frontend = Frontend(context.new_page(), url)
        frontend.open()
        yield frontend
        context.close()

    return open_page


@pytest.fixture
def frontend(open_frontend, comfy_server):
    """The page of the shared server, open and ready."""
    with open_frontend(comfy_server.url) as frontend:
        yield frontend


@pytest.fixture
def page(frontend):
    """Playwright's own page of `frontend`."""
    return frontend.page
