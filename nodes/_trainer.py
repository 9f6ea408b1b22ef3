"""What all trainer nodes share: widgets made from a config dataclass, and how a recipe is run inside the host."""

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import comfy.model_management
import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io
from PIL import Image

from ..models.errors import ConfigError
from ..models.formats import safe_name
from ..trainers.output import OutputPlace
from ..trainers.plots import loss_curve
from . import _host, _sockets

_BOUNDS: dict[str, tuple[float, float, float]] = {
    # name, or class.name where a class differs: smallest, largest, step; the config itself refuses what these would
    # still let through
    "steps": (1, 1_000_000, 1),
    "batch_size": (1, 256, 1),
    "gradient_accumulation": (1, 256, 1),
    "learning_rate": (1e-8, 1.0, 1e-8),
    "embedding_learning_rate": (1e-8, 1.0, 1e-8),
    "text_learning_rate": (1e-8, 1.0, 1e-8),
    "warmup_steps": (0, 100_000, 1),
    "weight_decay": (0.0, 1.0, 1e-6),
    "max_grad_norm": (0.0, 1000.0, 0.1),
    "seed": (0, 2**63 - 1, 1),
    "resolution": (0, 4096, 8),
    "crop_variants": (1, 64, 1),
    "offset_noise": (0.0, 1.0, 0.01),
    "snr_gamma": (0.0, 100.0, 0.1),
    "checkpoint_every": (0, 1_000_000, 1),
    "checkpoint_limit": (1, 100, 1),
    "preview_every": (0, 1_000_000, 1),
    "preview_steps": (1, 200, 1),
    "preview_guidance": (0.0, 30.0, 0.1),
    "beta": (-1.0, 100_000.0, 1.0),
    "rank": (1, 1024, 1),
    "prior_loss_weight": (0.0, 100.0, 0.01),
    "rescale_variants": (0, 1024, 1),
    "kept_share": (0.01, 1.0, 0.01),
    "class_pictures": (0, 100_000, 1),
    "class_steps": (1, 1000, 1),
    "sam_rho": (0.0, 100.0, 0.01),
    "PerfusionConfig.beta": (-2.0, 4.0, 0.01),
    "tau": (0.001, 2.0, 0.001),
    "ema_decay": (0.0, 0.9999, 0.0001),
    "captions": (0, 100_000_000, 1),
    "save_every": (0, 100_000_000, 1),
    "adapter_learning_rate": (1e-8, 1.0, 1e-8),
    "lora_rank": (0, 1024, 1),
    "copy_rank": (0, 1024, 1),
    "kv_drop_chance": (0.0, 1.0, 0.01),
    "adapter_drop_chance": (0.0, 1.0, 0.01),
    "text_drop_chance": (0.0, 1.0, 0.01),
    "lookahead_every": (0, 10_000, 1),
    "lookahead_batch_size": (1, 256, 1),
    "lcm_scale_every": (0, 100_000, 1),
    "lcm_full_chance": (0.0, 1.0, 0.01),
    "lcm_min_scale": (0.01, 1.0, 0.01),
}


@cache
def _explanations(config: type) -> dict[str, str]:
    """The text under each field of a config class and of its bases, as tooltips."""
    texts: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, text in zip(body, body[1:], strict=False):
            described = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and described:
                texts[field.target.id] = inspect.cleandoc(text.value.value).replace("``", "").replace("\n", " ")
    return texts


def widgets(config: type, *names: str, **defaults: Any) -> list[io.Input]:
    """Widgets for some settings of a config class; ``defaults`` replaces the class's own where a node knows better."""
    kinds, texts = get_type_hints(config), _explanations(config)
    made = []
    for name in names:
        kind, tooltip = kinds[name], texts[name]
        default = defaults.get(name, getattr(config, name))
        if get_origin(kind) is Literal:
            made.append(io.Combo.Input(name, options=list(get_args(kind)), default=default, tooltip=tooltip))
        elif kind is bool:
            made.append(io.Boolean.Input(name, default=default, tooltip=tooltip))
        elif kind is str:
            lines = name == "templates"
            made.append(io.String.Input(name, default=default, multiline=lines, tooltip=tooltip))
        else:
            low, high, step = _BOUNDS.get(f"{config.__name__}.{name}") or _BOUNDS[name]
            number = io.Int if kind is int else io.Float
            extra = {} if kind is int else {"round": False}
            if name == "seed":
                # The page would draw a new seed after every run, and so train again each time.
                extra = {"control_after_generate": False}
            made.append(number.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip, **extra))
    return made


def optional(widget: io.Input) -> io.Input:
    """The widget as one that prompts saved before there was one may leave out."""
    widget.optional = True
    return widget


OUTPUT_NAME = io.String.Input(
    "output_name",
    default="my_dog",
    tooltip="Name of the LoRA file and of the embedding file. Both appear in their lists after pressing R.",
)
OVERWRITE = io.Boolean.Input(
    "overwrite", default=False, tooltip="Replace files of the same name instead of refusing to start."
)
STOPPING = _sockets.Stopping.Input(
    "stopping", optional=True, tooltip="A rule that ends the training, such as Stop: DVAR."
)


def refuse_unknown(node: type[io.ComfyNode], settings: Iterable[str], offered: Iterable[str]) -> None:
    """ConfigError for settings that the node does not offer, although its config may have them."""
    if unknown := set(settings) - set(offered):
        name = node.define_schema().display_name
        raise ConfigError(f"unknown setting(s) {', '.join(sorted(unknown))} of {name}; remove them")


def check_output_name(name: str | None) -> bool | str:
    """For validate_inputs: True, or what is wrong with a name that leaves its folder or that files cannot carry."""
    try:
        safe_name(name) if name is not None else None
    except ConfigError as error:
        return str(error)
    return True


def output_place(name: str, overwrite: bool, kind: str = "loras") -> OutputPlace:
    """The host's folders for LoRAs (or another kind of result) and embeddings, and a run folder below its output."""
    return OutputPlace(
        safe_name(name),
        _host.save_folder(kind),
        _host.save_folder("embeddings"),
        run_folder(name),
        overwrite=overwrite,
    )


def run_folder(name: str) -> Path:
    """Where the training of that output_name keeps its log and its states."""
    return Path(folder_paths.get_output_directory()) / "personalize" / safe_name(name)


def origin_metadata(hidden: Any) -> dict[str, str]:
    """The workflow and prompt that a file was made by, unless the user told the host to store neither."""
    if args.disable_metadata:
        return {}
    found = {"workflow": (hidden.extra_pnginfo or {}).get("workflow"), "prompt": hidden.prompt}
    return {name: json.dumps(value) for name, value in found.items() if value is not None}


def run_training(node: type[io.ComfyNode], train: Callable[..., Any]) -> io.NodeOutput:
    """Run ``train(device=…, progress=…, metadata=…, before_loading=…)`` outside inference mode, and show the result.

    The host's models leave the device only once the training has checked all that can be checked without it.

    A cancelled training has saved its weights and its state by the time the host learns of the Cancel.
    """
    progress = _host.HostProgress(node.hidden.unique_id)
    with _host.memory_given_back(), _host.leave_inference_mode(), _host.short_paths():
        result = train(
            device=comfy.model_management.get_torch_device(),
            progress=progress,
            metadata=origin_metadata(node.hidden),
            before_loading=_host.free_vram,
        )
    progress.raise_if_cancelled()
    curve = loss_curve(result.train.losses, result.train.evaluations, result.train.criterion)
    preview = result.preview or Image.new("RGB", (64, 64))
    images = _host.pictures_to_images([curve])
    return io.NodeOutput(
        result.files[0].name,
        images,
        _host.pictures_to_images([preview]),
        result.train.steps,
        result.train.summary,
        ui=_shown(node, images, result.train.summary),
    )


def _shown(node: type[io.ComfyNode], images, summary: str) -> Mapping[str, Any]:
    from comfy_api.latest import ui

    return {"text": [summary], **ui.PreviewImage(images, cls=node).as_dict()}


OUTPUTS = [
    _sockets.Name.Output(
        display_name="lora_name", tooltip="Name of the trained file; connect it to Load DCO LoRA's lora_name."
    ),
    io.Image.Output(
        display_name="loss_curve",
        tooltip="Loss per step, its running mean, and what a stopping rule looked at: its evaluations in orange, its "
        "own value in green with its threshold, and the step at which it stopped.",
    ),
    io.Image.Output(display_name="preview", tooltip="The last preview picture; black when none was asked for."),
    io.Int.Output(display_name="steps", tooltip="Optimizer steps done."),
    io.String.Output(display_name="summary", tooltip="Steps, speed, memory and why training ended."),
]
"""What every trainer node gives."""
