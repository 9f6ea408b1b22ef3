"""Which words learned tokens start from, chosen by CLIP: Choose Initializer."""

from typing import get_args

from comfy_api.latest import io

from ..models.errors import ConfigError
from ..trainers.initializers import Choice, InitializerSettings, Strategy, choose_initializers
from . import _host, _sockets
from ._choices import first_refusal, known
from ._folders import JUDGES
from ._network_folders import NONE, chosen_folder, folder_input, folder_version, known_folder, network_folders

SHOWN = 20
"""Words of a ranking that are listed."""


class ChooseInitializer(io.ComfyNode):
    """Replace the words that a dataset's tokens start from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeChooseInitializer",
            display_name="Choose Initializer",
            category="personalize/data",
            description="Chooses the word that each learned token starts from: the one most like its pictures as CLIP "
            "sees them, the least like, or any at random.",
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[  # append only: workflows store widget values by position
                _sockets.Dataset.Input("dataset", tooltip="From Personalization Dataset; with at least one token."),
                io.Combo.Input(
                    "strategy",
                    options=list(get_args(Strategy)),
                    default="best",
                    tooltip="best takes the word most like the pictures, worst the least like, random any of them. "
                    "worst and random are for experiments.",
                ),
                folder_input(
                    "clip_folder",
                    network_folders(JUDGES, "clip"),
                    "For best and worst: a CLIP in transformers' layout, a folder in models/scoring. The "
                    "authors use openai/clip-vit-base-patch32.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    multiline=True,
                    tooltip="Candidates, one per line. Empty tries all words that are a single token of CLIP's "
                    "vocabulary: minutes on a GPU, much longer without one.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of the random word, and of the four sentences that words are tried in.",
                ),
            ],
            outputs=[
                _sockets.Dataset.Output(display_name="dataset", tooltip="The same pictures; tokens start anew."),
                io.String.Output(
                    display_name="initializer", tooltip="The chosen words, separated by commas, one per token."
                ),
                io.String.Output(
                    display_name="ranking", tooltip="The words most and least like the pictures, in Markdown."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, strategy=None, clip_folder=None) -> bool | str:
        return first_refusal(
            [
                known("strategy", strategy, get_args(Strategy)),
                known_folder("CLIP folder", clip_folder, network_folders(JUDGES, "clip")),
            ]
        )

    @classmethod
    def fingerprint_inputs(cls, clip_folder=None, **_others) -> str:
        return folder_version(network_folders(JUDGES, "clip").get(clip_folder))

    @classmethod
    def execute(cls, dataset, strategy, clip_folder, words="", seed=0) -> io.NodeOutput:
        if strategy != "random" and clip_folder == NONE:
            raise ConfigError(
                f"the strategy {strategy} needs a CLIP; put the files of openai/clip-vit-base-patch32 into "
                "models/scoring/clip-vit-base-patch32 and choose it as clip_folder, or choose random"
            )
        progress = _host.HostProgress(cls.hidden.unique_id)

        def advance(done: int, total: int) -> None:
            progress.report(done, total, f"reading words: {done} of {total}")
            progress.raise_if_cancelled()

        with _host.short_paths(), _host.memory_given_back():
            settings = InitializerSettings(
                strategy=strategy,
                clip=None if clip_folder == NONE else chosen_folder(network_folders(JUDGES, "clip"), clip_folder),
                words=tuple(words.splitlines()),
                seed=seed,
            )
            tokenizer = _host.tokenizer_folder()
            judge = settings.open(tokenizer)
            if judge is not None:
                judge.network.to(_host.device_with_room(judge.network))
            chosen, choices = choose_initializers(dataset, settings, judge=judge, tokenizer=tokenizer, advance=advance)
        ranking = "\n\n".join(_described(choice) for choice in choices)
        return io.NodeOutput(chosen, ", ".join(choice.word for choice in choices), ranking, ui={"text": [ranking]})


def _described(choice: Choice) -> str:
    """A heading, and the words most and least like the pictures as a Markdown table."""
    lines = [f"`{choice.trigger}` starts from {choice.word}"]  # bare, Markdown takes it for markup
    if choice.ranking:
        lines += ["", "| word | similarity |", "| --- | ---: |"]
        rows = [f"| {word} | {score:.4f} |" for word, score in choice.ranking]
        lines += rows if len(rows) <= SHOWN else [*rows[: SHOWN // 2], "| … | |", *rows[-SHOWN // 2 :]]
    return "\n".join(lines)
