"""The demo without ComfyUI: the same job through the command line of the trainers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from job import COLUMNS, NAME, PROMPTS, SUBJECT, TRAINING, Job, Outcome, personalized
from methods import TEXT_SCALE
from scenes import SIDE
from subjects import WORD

from comfyui_personalize.trainers.__main__ import main
from comfyui_personalize.trainers.plots import loss_curve


def run(job: Job) -> Outcome:
    """Train, then sample every prompt in every way.

    Raises:
        RuntimeError: a command failed; it has said why.
    """
    output = job.work / "output"
    train = {
        "device": "cpu",
        "base": {"path": str(job.checkpoint)},
        "dataset": {
            "folder": str(job.lessons),
            "tokens": [{"trigger": SUBJECT.token, "initializer": WORD}],
        },
        "train": TRAINING | {"steps": job.steps},
        "output": {"name": NAME, "folder": str(output), "overwrite": True},
    }
    _command("dco", _write_toml(job.work / "train.toml", train))
    log = (output / "runs" / NAME / "log.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    lora = output / "loras" / f"{NAME}.safetensors"
    outcome = Outcome(loss_curve(losses), [lora, output / "embeddings" / f"{NAME}.safetensors"])

    sample = {
        "device": "cpu",
        "base": {"path": str(job.checkpoint)},
        "lora": {"path": str(lora)},
        "sample": {"prompt": "", "steps": job.sampling_steps, "width": SIDE, "height": SIDE, "text_scale": TEXT_SCALE},
        "output": {"folder": str(job.work / "pictures")},
    }
    config = _write_toml(job.work / "sample.toml", sample)
    for number, (prompt, seed) in enumerate(PROMPTS.items()):
        for column in COLUMNS:
            name = f"{number}_{column.file}"
            words = [f"sample.prompt={personalized(prompt)}", f"sample.seed={seed}"]
            words += [f"sample.base_prompt={prompt.format(column.base_subject)}"]
            words += [f"sample.reward_scale={column.reward_scale}", f"output.name={name}"]
            _command("dco-sample", config, *words)
            outcome.pictures[prompt, column] = job.work / "pictures" / f"{name}_{seed}.png"
    return outcome


def _command(recipe: str, config: Path, *overrides: str) -> None:
    """The command line's entry, in this process: the first start of a process takes longer than the whole sampling."""
    words = [recipe, "--config", str(config), *overrides]
    print(f"$ python -m comfyui_personalize.trainers {shlex.join(words)}", flush=True)
    if status := main(words):
        raise RuntimeError(f"{recipe} ended with status {status}")


def _write_toml(path: Path, values: dict[str, Any]) -> Path:
    """Plain values first, then one table per dictionary; lists of dictionaries inline."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            tables = (", ".join(f"{key} = {text(item)}" for key, item in table.items()) for table in value)
            return f"[{', '.join(f'{{ {table} }}' for table in tables)}]"
        return json.dumps(value)

    plain = [f"{key} = {text(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = [
        "\n".join(["", f"[{name}]", *(f"{key} = {text(value)}" for key, value in table.items())])
        for name, table in values.items()
        if isinstance(table, dict)
    ]
    path.write_text("\n".join([*plain, *tables, ""]), encoding="utf-8")
    return path
