"""Losses of several trainings in one plot: Compare Loss Curves."""

from pathlib import Path

from comfy_api.latest import io, ui

from ..models.errors import ConfigError
from ..trainers.plots import compared_curves
from ..trainers.run_log import LOG, LoggedRun, read_log
from . import _host
from ._choices import first_refusal
from ._trainer import check_output_name, run_folder

_RUNS = ("run_1", "run_2", "run_3", "run_4")


class CompareLossCurves(io.ComfyNode):
    """Show how far trainings went, and how their losses fell."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeCompareLossCurves",
            display_name="Compare Loss Curves",
            category="personalize/training",
            description="Draws the losses of up to four trainings into one plot, each up to the step at which it "
            "ended: the same training with other stopping rules, rates or methods.",
            is_output_node=True,
            inputs=[
                io.String.Input(
                    name,
                    default="",
                    optional=name != _RUNS[0],
                    tooltip="Name of a training, as its output_name; or connect the trainer's first output, which also "
                    "has it trained first. Empty is left out.",
                )
                for name in _RUNS
            ],
            outputs=[
                io.Image.Output(
                    display_name="plot",
                    tooltip="Running means of the losses; thin lines are evaluations, marks are where trainings ended.",
                ),
                io.String.Output(display_name="table", tooltip="Steps and last losses in Markdown, for Preview Any."),
            ],
        )

    @classmethod
    def validate_inputs(cls, **runs) -> bool | str:
        return first_refusal([check_output_name(name) for name in runs.values() if name])

    @classmethod
    def fingerprint_inputs(cls, **runs) -> str:
        return _host.file_version(*(_folder(name) / LOG for name in runs.values() if name))

    @classmethod
    def execute(cls, **runs) -> io.NodeOutput:
        folders = [_folder(runs[name]) for name in _RUNS if runs.get(name)]
        if not folders:
            raise ConfigError("there is no training to show; connect a trainer's first output, or give its output_name")
        found = {folder.name: read_log(folder) for folder in folders}
        plot, table = _host.pictures_to_images([compared_curves(found)]), _table(found)
        return io.NodeOutput(plot, table, ui={"text": [table], **ui.PreviewImage(plot, cls=cls).as_dict()})


def _folder(name: str) -> Path:
    """Where the run of that output_name, or with a file of that name, has its log."""
    return run_folder(name.strip().removesuffix(".safetensors"))


def _table(runs: dict[str, LoggedRun]) -> str:
    lines = ["| training | steps | loss, mean of the last twentieth | last evaluation |", "| --- | --- | --- | --- |"]
    for name, run in runs.items():
        last = run.losses[-max(len(run.losses) // 20, 1) :]
        evaluated = f"{run.evaluations[-1][1]:.4f}" if run.evaluations else "–"
        lines.append(f"| {name} | {len(run.losses)} | {sum(last) / len(last):.4f} | {evaluated} |")
    return "\n".join(lines)
