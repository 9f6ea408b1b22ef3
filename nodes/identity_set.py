"""Nodes that make the set of people which a face encoder is trained on, some pictures per run."""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from ..models.errors import ConfigError, DatasetError
from ..models.formats import safe_name
from ..trainers.lookahead.identity_set import METADATA, SEEDS, IdentitySet, Portrait, portraits
from ..trainers.pictures import Picture
from . import _host, _input_folder, _sockets, _trainer
from ._choices import first_refusal, known, single

SHIPPED, NO_FILE = "shipped", "(none)"
LISTS = Path(__file__).resolve().parents[1] / "workflows" / "identity_set"
"""The lists of names and prompts that ship with the extension."""
_NAMES, _VANILLA, _STYLIZED = "names.txt", "vanilla_prompts.txt", "stylized_prompts.txt"
_MOST = 1_000_000
"""Pictures of a set; each run looks for all of them."""


def _set_name(tooltip: str) -> io.Input:
    return io.String.Input("set_name", default="my_people", tooltip=tooltip)


def _list_inputs(name: str, what: str, shipped: str) -> list[io.Input]:
    return [
        io.Combo.Input(
            f"{name}_file",
            options=[SHIPPED, NO_FILE, *_input_folder.text_files()],
            default=SHIPPED,
            tooltip=f"{what}, one per line: the {shipped} that ship with the extension, a text file in the input "
            "folder, or none.",
        ),
        io.String.Input(name, default="", multiline=True, tooltip="More of them, one per line."),
    ]


class IdentityPrompts(io.ComfyNode):
    """The next pictures of a set of people, as prompts and seeds for the stock sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeIdentityPrompts",
            display_name="Identity Prompts",
            category="personalize/data",
            description="Puts people into prompts, for a set of generated people to train a face encoder on "
            "(arXiv 2404.03620). Each run goes on with the pictures that the set does not have yet.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                _set_name("Folder of the set, below the input folder. The same as in Save Identity Set."),
                *_list_inputs("names", "People", "100 names"),
                *_list_inputs("vanilla_prompts", "Prompts of plain photographs, with conceptname for the person",
                              "20"),
                *_list_inputs("stylized_prompts", "Prompts of pictures in a style, with conceptname for the person",
                              "40"),
                io.Int.Input("vanilla_pictures", default=2, min=0, max=1000,
                             tooltip="Photographs of each person and prompt, with a seed each."),
                io.Int.Input("stylized_pictures", default=1, min=0, max=1000,
                             tooltip="Pictures of each person and prompt in a style."),
                io.Int.Input("first_person", default=1, min=1, max=1_000_000,
                             tooltip="Number of the name to begin with, to share the work among machines."),
                io.Int.Input("people", default=0, min=0, max=1_000_000,
                             tooltip="How many names from there on; 0 is all."),
                io.Int.Input("count", default=16, min=1, max=4096,
                             tooltip="Most pictures per run. A run that is cancelled loses its own, and no other's."),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, control_after_generate=False,
                             tooltip="Each picture's own seed follows from this, its person, prompt and number. Keep "
                             "it while you fill a set."),
            ],
            outputs=[
                io.String.Output(display_name="text", is_output_list=True,
                                 tooltip="Prompts with the people's names, for CLIP Text Encode."),
                io.Int.Output(display_name="seed", is_output_list=True, tooltip="Each picture's own, for the sampler."),
                io.String.Output(display_name="identity", is_output_list=True,
                                 tooltip="Who is shown, for Save Identity Set."),
                io.String.Output(display_name="prompt", is_output_list=True,
                                 tooltip="Prompts with conceptname, for Save Identity Set."),
                io.Boolean.Output(display_name="vanilla", is_output_list=True,
                                  tooltip="Whether it is a plain photograph, for Save Identity Set."),
                io.Int.Output(display_name="left", tooltip="Pictures that the set will still lack after this run."),
                io.String.Output(display_name="set_name", tooltip="For Save Identity Set."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(
        cls, set_name=None, names_file=None, vanilla_prompts_file=None, stylized_prompts_file=None
    ) -> bool | str:
        files = [SHIPPED, NO_FILE, *_input_folder.text_files()]
        chosen = (names_file, vanilla_prompts_file, stylized_prompts_file)
        return first_refusal(
            [_trainer.check_output_name(set_name), *(known("text file", name, files) for name in chosen)]
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> float:
        return float("nan")  # every run goes on, although no widget has changed

    @classmethod
    def execute(
        cls, set_name, names_file, names, vanilla_prompts_file, vanilla_prompts, stylized_prompts_file,
        stylized_prompts, vanilla_pictures, stylized_pictures, first_person, people, count, seed,
    ) -> io.NodeOutput:  # fmt: skip
        with _host.short_paths():
            everybody = _lines(_NAMES, names_file, names)
            if not everybody:
                raise ConfigError("found no name, expected at least one; choose a names_file, or write names in lines")
            chosen = everybody[first_person - 1 :][: people or None]
            if not chosen:
                raise ConfigError(
                    f"first_person is {first_person} and there are {len(everybody)} names; choose a lower number"
                )
            vanilla = _lines(_VANILLA, vanilla_prompts_file, vanilla_prompts)
            stylized = _lines(_STYLIZED, stylized_prompts_file, stylized_prompts)
            total = len(chosen) * (len(vanilla) * vanilla_pictures + len(stylized) * stylized_pictures)
            if not 0 < total <= _MOST:
                raise ConfigError(
                    f"the set would have {total} pictures, expected 1 to {_MOST}; choose or write prompts, and set "
                    "vanilla_pictures and stylized_pictures"
                )
            existing = _identity_set(set_name)
            counts = {"vanilla_pictures": vanilla_pictures, "stylized_pictures": stylized_pictures}
            planned = portraits(chosen, vanilla, stylized, **counts, seed=seed)
            missing = [portrait for portrait in planned if not existing.holds(portrait)]
        done = total - len(missing)
        told = f"{set_name}: {done} of {total} pictures are there"
        _host.HostProgress(cls.hidden.unique_id).report(done, total, told)
        made = missing[:count]
        if not made:
            # Not an error: of many runs in the queue, the last ones find nothing left.
            return io.NodeOutput(*([ExecutionBlocker(None)] for _ in range(5)), 0, set_name)
        columns = zip(*((one.text, one.seed, one.identity, one.prompt, one.vanilla) for one in made), strict=True)
        return io.NodeOutput(*map(list, columns), len(missing) - len(made), set_name)


class SaveIdentitySet(io.ComfyNode):
    """Generated people as files that the encoder's training reads."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeSaveIdentitySet",
            display_name="Save Identity Set",
            category="personalize/data",
            description="Adds pictures to a set of people: files whose names tell person and prompt, and the "
            "metadata.json that Train Lookahead Encoder reads. Pictures that the set has stay.",
            is_output_node=True,
            is_input_list=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The pictures: a list, or a batch of one person and prompt."),
                _set_name("Folder of the set, below the input folder; people_folder of Train Lookahead Encoder."),
                io.String.Input("identity", default="Ada Example", tooltip="Who is shown. Also a folder in the set."),
                io.String.Input("prompt", default="A photo of conceptname",
                                tooltip="What is shown, with conceptname where the person is named."),
                io.Boolean.Input("vanilla", default=True,
                                 tooltip="On for plain photographs, off for pictures in a style."),
                io.Int.Input("seed", default=0, min=0, max=SEEDS - 1, control_after_generate=False,
                             tooltip="Number in the file's name; the pictures of a batch count on from it."),
            ],
            outputs=[
                _sockets.Name.Output(
                    display_name="set_name",
                    tooltip="Name of the folder; connect it to Train Lookahead Encoder's people_folder.",
                ),
                io.Int.Output(display_name="pictures", tooltip="Pictures in the set."),
                io.Int.Output(display_name="people", tooltip="People in the set."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, set_name=None) -> bool | str:
        return _trainer.check_output_name(single(set_name))

    @classmethod
    def fingerprint_inputs(cls, set_name=None, **_others) -> str:
        name = single(set_name)
        known_name = name is not None and _trainer.check_output_name(name) is True
        return _host.file_version(_set_folder(name) / METADATA) if known_name else ""

    @classmethod
    def execute(cls, images, set_name, identity, prompt, vanilla, seed) -> io.NodeOutput:
        plan = _plan(images, {"identity": identity, "prompt": prompt, "vanilla": vanilla, "seed": seed})
        name = safe_name(set_name[0])
        progress, written = _host.HostProgress(cls.hidden.unique_id, len(plan)), 0
        with _host.short_paths():
            people = _identity_set(name)
            try:
                for number, (portrait, picture) in enumerate(plan.items(), 1):
                    if progress.cancelled():
                        break
                    written += people.add(portrait, Picture.from_tensor(picture, f"picture {number}").open().rgb)
                    progress.report(number, len(plan), f"{name}: {number} of {len(plan)} saved")
            finally:
                people.close()
        progress.raise_if_cancelled()
        pictures, persons = people.counts
        summary = f"{name}: {written} new, {pictures} pictures of {persons} people"
        progress.report(len(plan), len(plan), summary)
        return io.NodeOutput(name, pictures, persons, ui={"images": _shown(name, plan), "text": [summary]})


def _plan(images: list[Tensor], told: Mapping[str, list]) -> dict[Portrait, Tensor]:
    """What is to be saved as what; ConfigError unless there is one of everything for each batch, or one for all."""
    for what, values in told.items():
        if len(values) not in (1, len(images)):
            raise ConfigError(
                f"there are {len(images)} images and {len(values)} of {what}; give one for each, or one for all"
            )
    plan: dict[Portrait, Tensor] = {}
    for index, batch in enumerate(images):
        identity, prompt, vanilla, seed = (values[index % len(values)] for values in told.values())
        for place, picture in enumerate(_host.image_list([batch])):
            portrait = Portrait(" ".join(identity.split()), " ".join(prompt.split()), vanilla, (seed + place) % SEEDS)
            if portrait in plan:
                raise ConfigError(f"two images would become {portrait.name}; give them seeds of their own")
            plan[portrait] = picture
    return plan


def _shown(name: str, plan: Iterable[Portrait]) -> list[dict[str, str]]:
    """The pictures as the page asks for them."""
    paths = [PurePosixPath(name, portrait.name) for portrait in plan]
    return [{"filename": path.name, "subfolder": str(path.parent), "type": "input"} for path in paths]


def _identity_set(name: str) -> IdentitySet:
    return IdentitySet(_set_folder(name))


def _set_folder(name: str) -> Path:
    return Path(folder_paths.get_input_directory()) / safe_name(name)


def _lines(shipped: str, file: str, more: str) -> list[str]:
    """Lines of a list and of a widget, without empty ones and without repetitions, which name the same file.

    Raises DatasetError when the file leads out of the input folder, or cannot be read.
    """
    texts = [more]
    if file != NO_FILE:
        path = LISTS / shipped if file == SHIPPED else _input_folder.text_path(file)
        try:
            texts.insert(0, path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{path.name} cannot be read; save it as UTF-8 text in the input folder") from error
    found: dict[str, str] = {}
    for line in (" ".join(line.split()) for text in texts for line in text.splitlines()):
        found.setdefault(line.casefold(), line)
    found.pop("", None)
    return list(found.values())
