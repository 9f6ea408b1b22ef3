"""Several Custom Diffusions as one file, without training."""

from itertools import zip_longest

import comfy.model_management
from comfy_api.latest import io

from ..models.errors import ConfigError
from . import _host, _sockets, _trainer
from ._choices import first_refusal, known
from ._folders import CUSTOM_DIFFUSIONS
from ._lines import lines_of
from .learned_tokens import tokens_output

NONE = "(none)"
_NAMES = ("custom_name", "custom_name_2", "custom_name_3", "custom_name_4")


class MergeCustomDiffusion(io.ComfyNode):
    """The constrained merge of two to four concepts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = _host.model_files(CUSTOM_DIFFUSIONS)
        return io.Schema(
            node_id="PersonalizeMergeCustomDiffusion",
            display_name="Merge Custom Diffusion",
            category="personalize/tokens",
            description="Makes one Custom Diffusion of several, so that their words can stand in one prompt. It is "
            "computed and not trained: each word is read as in its own file, and ordinary captions as before.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[  # append only: workflows store widget values by position
                _sockets.Base.Input("base", tooltip="From Load Training Base: the model that all were trained on."),
                io.Combo.Input("custom_name", options=files, tooltip="The first file, with keys and values alone."),
                io.Combo.Input("custom_name_2", options=files, tooltip="The second file."),
                io.Combo.Input("custom_name_3", options=[NONE, *files], default=NONE, tooltip="A third file."),
                io.Combo.Input("custom_name_4", options=[NONE, *files], default=NONE, tooltip="A fourth file."),
                io.String.Input(
                    "phrases",
                    default="",
                    multiline=True,
                    tooltip="What names each concept in prompts, a line per file, such as <dog> dog. An empty line "
                    "takes the file's word, and the class that it was trained with.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="Ordinary captions, a line each, whose pictures are to change least; 200 are read. Empty "
                    "takes built-in ones.",
                ),
                io.String.Input(
                    "output_name", default="my_concepts", tooltip="Name of the file in models/custom_diffusion."
                ),
                _trainer.OVERWRITE,
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="custom_name",
                    tooltip="Name of the file; connect it to Load Custom Diffusion's custom_name.",
                ),
                tokens_output(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, custom_name=None, custom_name_2=None, custom_name_3=None, custom_name_4=None, output_name=None
    ) -> bool | str:
        files = _host.model_files(CUSTOM_DIFFUSIONS)
        checks = [known("Custom Diffusion file", name, files) for name in (custom_name, custom_name_2)]
        checks += [known("Custom Diffusion file", name, [NONE, *files]) for name in (custom_name_3, custom_name_4)]
        return first_refusal([*checks, _trainer.check_output_name(output_name)])

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> str:
        return _host.model_version(CUSTOM_DIFFUSIONS, *(inputs.get(name) for name in _NAMES))

    @classmethod
    def execute(
        cls,
        base,
        custom_name,
        custom_name_2,
        custom_name_3=NONE,
        custom_name_4=NONE,
        phrases="",
        captions="",
        output_name="my_concepts",
        overwrite=False,
    ) -> io.NodeOutput:
        from ..trainers.dvar.merge import merge, read_concept
        from ..trainers.progress import Cancelled

        names = [name for name in (custom_name, custom_name_2, custom_name_3, custom_name_4) if name != NONE]
        lines = phrases.rstrip().splitlines()
        if len(lines) > len(names):
            raise ConfigError(f"there are {len(lines)} phrases for {len(names)} files; write one line per file")
        place = _trainer.output_place(output_name, overwrite, CUSTOM_DIFFUSIONS)
        progress = _host.HostProgress(cls.hidden.unique_id)
        with _host.memory_given_back(), _host.leave_inference_mode(), _host.short_paths():
            concepts = [
                read_concept(_host.model_path(CUSTOM_DIFFUSIONS, name), phrase)
                for name, phrase in zip_longest(names, lines, fillvalue="")
            ]
            try:
                path, words = merge(
                    concepts,
                    base,
                    place,
                    captions=lines_of(captions),
                    device=comfy.model_management.get_torch_device(),
                    progress=progress,
                    metadata=_trainer.origin_metadata(cls.hidden),
                    before_loading=_host.free_vram,
                )
            except Cancelled:
                progress.raise_if_cancelled()
                raise
        tokens = ", ".join(words)
        return io.NodeOutput(path.name, tokens, ui={"text": [tokens]})
