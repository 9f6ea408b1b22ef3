"""The demo in a real ComfyUI: the shipped workflows posted to a headless server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client import Client, Run
from job import (
    CHECKPOINT,
    COLUMNS,
    NAME,
    PLAIN,
    PROMPTS,
    SUBJECT,
    TRAINING,
    Column,
    Job,
    Outcome,
    personalized,
)
from methods import TEXT_SCALE
from scenes import SIDE
from server import Server
from subjects import WORD

from comfyui_personalize.trainers.progress import TerminalProgress

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows" / "api"

Graph = dict[str, dict[str, Any]]


def run(job: Job, comfyui: Path) -> Outcome:
    """Start the server, train, sample, stop the server.

    Raises:
        RuntimeError: the server or a workflow failed; the message says how.
    """
    base = job.work / "comfyui"
    print(f"Starting {comfyui} without a window ...", flush=True)
    with Server(comfyui, base, checkpoints={CHECKPOINT: job.checkpoint}) as server, Client(server.url) as client:
        paths = [example.picture.path for example in job.examples()]
        images = [client.upload(path.read_bytes(), f"{NAME}_{path.name}") for path in paths]
        print(f"It answers at {server.url}. Training with workflows/api/dco_train_subject.json:", flush=True)
        graph = training_graph(job, images)
        trained = _post(client, graph, "Train DCO")
        curve = client.images(trained, loss_curve_node(graph))[0]
        files = [base / "models" / kind / f"{NAME}.safetensors" for kind in ("loras", "embeddings")]
        outcome = Outcome(curve, files)

        print("Sampling with workflows/api/dco_reward_guidance.json:", flush=True)
        folder = job.work / "pictures"
        folder.mkdir()
        wanted = [(prompt, column) for prompt in PROMPTS for column in COLUMNS]
        bar = TerminalProgress()
        for index, (prompt, column) in enumerate(wanted):
            made = _post(client, sampling_graph(job, prompt, column))
            entry = next(entry for output in made.outputs.values() for entry in output.get("images", []))
            path = folder / f"{index}.png"
            path.write_bytes(client.view(**entry))  # as it is: the workflow is inside
            outcome.pictures[prompt, column] = path
            bar.report(index + 1, len(wanted), "pictures")
    return outcome


def training_graph(job: Job, images: list[str]) -> Graph:
    """The shipped training workflow with the demo's pictures and settings for a tiny model."""
    graph = read_workflow("dco_train_subject")
    places = sorted(_nodes(graph, "PersonalizeTrainingPicture"), key=int)
    if len(places) != len(images):
        raise RuntimeError(f"the training workflow has places for {len(places)} pictures, the demo has {len(images)}")
    for place, image, example in zip(places, images, job.examples()):
        values = {"image": image, "caption": example.caption, "base_caption": example.base_caption}
        graph[place]["inputs"].update(values)
    put(graph, "PersonalizePersonalizationDataset", token=SUBJECT.token, initializer=WORD)
    put(graph, "PersonalizeLoadTrainingBase", ckpt_name=CHECKPOINT)
    previews = {"preview_every": max(job.steps // 4, 1), "preview_prompt": personalized(next(iter(PROMPTS)))}
    previews |= {"preview_steps": job.sampling_steps, "preview_guidance": TEXT_SCALE}
    put(graph, "PersonalizeTrainDCO", output_name=NAME, overwrite=True, steps=job.steps, **TRAINING, **previews)
    return graph


def sampling_graph(job: Job, prompt: str, column: Column) -> Graph:
    """The shipped sampling workflow for one picture; PLAIN puts the host's own guider in the reward guider's place."""
    graph = read_workflow("dco_reward_guidance")
    put(graph, "CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    put(graph, "PersonalizeLoadDCOLoRA", lora_name=f"{NAME}.safetensors")
    put(graph, "RandomNoise", noise_seed=PROMPTS[prompt])
    put(graph, "BasicScheduler", steps=job.sampling_steps)
    put(graph, "EmptyLatentImage", width=SIDE, height=SIDE)
    put(graph, "PersonalizeRewardGuider", text_scale=TEXT_SCALE, reward_scale=max(column.reward_scale, 0.0))
    guider = graph[_nodes(graph, "PersonalizeRewardGuider")[0]]
    links = guider["inputs"]
    for socket, text in (("personalized", personalized(prompt)), ("base", prompt.format(column.base_subject))):
        graph[links[socket][0]]["inputs"]["text"] = text
    if column.reward_scale == PLAIN:
        guider["class_type"] = "CFGGuider"
        guider["inputs"] = {
            "model": links["model"],
            "positive": links["personalized"],
            "negative": links["negative"],
            "cfg": TEXT_SCALE,
        }
    return graph


def read_workflow(name: str) -> Graph:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def put(graph: Graph, kind: str, **values: Any) -> None:
    """Set inputs of the workflow's nodes of one kind; RuntimeError when it has none, or not that input."""
    for name in _nodes(graph, kind):
        inputs = graph[name]["inputs"]
        if unknown := sorted(values.keys() - inputs.keys()):
            raise RuntimeError(f"the workflow's {kind} has no input {', '.join(unknown)}")
        inputs.update(values)


def loss_curve_node(graph: Graph) -> str:
    """The node that saves the trainer's second output."""
    trainer = _nodes(graph, "PersonalizeTrainDCO")[0]
    return next(name for name in _nodes(graph, "SaveImage") if graph[name]["inputs"]["images"] == [trainer, 1])


def _nodes(graph: Graph, kind: str) -> list[str]:
    found = [name for name, node in graph.items() if node["class_type"] == kind]
    if not found:
        raise RuntimeError(f"the workflow has no node {kind}")
    return found


def _post(client: Client, graph: Graph, label: str = "") -> Run:
    """Run a workflow; with a label, show a bar of its progress messages."""
    bar = TerminalProgress() if label else None

    def show(kind: str, data: dict) -> None:
        if bar is not None and kind == "progress":
            bar.report(int(data["value"]), int(data["max"]), label)

    run = client.run(graph, timeout=3600, on_event=show)
    if run.status != "success":
        reason = (run.error or {}).get("exception_message", "it was interrupted").strip()
        raise RuntimeError(f"the workflow ended with: {reason}")
    return run
