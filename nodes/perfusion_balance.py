"""Which beta and tau to sample a Perfusion concept with: tried out, scored, and chosen by a rule."""

from collections.abc import Sequence

from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..models.errors import ConfigError
from ..models.perfusion.balance import BETAS, TAUS, balance_table, choose, read_values
from ..trainers.dataset import Example
from ..trainers.perfusion.balance_pictures import contact_sheet, front_chart
from ..trainers.pictures import Picture
from . import _host, _sampling_inputs, _sockets
from ._choices import first_refusal, known
from ._folders import JUDGES
from ._network_folders import NONE, chosen_folder, folder_input, folder_version, network_folders
from .gate_sweep import decoded, in_plain_words, prompts_of, scored, sweep, with_gate
from .learned_tokens import teach
from .perfusion_prompts import encode, with_words

_MOST = 512
"""Pictures of a sweep: beyond these the contact sheet helps nobody."""
_NO_CLIP = "there is nothing to score with: choose a clip_folder, a CLIP in transformers' layout in models/scoring"


class PerfusionBalance(io.ComfyNode):
    """Sweep the gate of a concept and choose."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizePerfusionBalance",
            display_name="Perfusion Balance",
            category="personalize/perfusion",
            description="Finds the beta and tau at which a concept looks like its pictures and still obeys prompts: "
            "samples every pair, scores it with CLIP, and chooses the most balanced one of the Pareto front.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The family that the concepts were trained on."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                _sockets.Concepts.Input("concepts", tooltip="From Load Perfusion Concept."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Size of the pictures, and as batch size how many of each prompt; from Empty Latent Image.",
                ),
                io.Int.Input(
                    "number",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Which concept of the chain is tried out; the others keep their gates.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of a {1}\na {1} on a beach\na painting of a {1}",
                    tooltip="One prompt per line, each with the concept's word or its number, such as {1}. Everyday "
                    "scenes that the training pictures do not show tell the most.",
                ),
                io.String.Input(
                    "negative",
                    multiline=True,
                    default="",
                    tooltip="What the pictures should not show. {1}, {2} … stand for the concepts' words here, too.",
                ),
                io.String.Input(
                    "betas",
                    default="0.5, 0.6, 0.7, 0.8",
                    tooltip="Values of beta to try, separated by commas, -2 to 4. The authors sample with 0.6 to 0.7.",
                ),
                io.String.Input(
                    "taus",
                    default="0.1, 0.15, 0.2",
                    tooltip="Values of tau to try, separated by commas, 0.001 to 2. The authors sample with 0.15.",
                ),
                folder_input(
                    "clip_folder",
                    network_folders(JUDGES, "clip"),
                    "What scores: a CLIP in transformers' layout, a folder in models/scoring.",
                ),
                _sampling_inputs.seed(", the same for every pair"),
                _sampling_inputs.steps(20),
                _sampling_inputs.scale("cfg", 6.0, "Guidance by the prompt; 6 is the authors'."),
                *_sampling_inputs.algorithm(),
                io.Boolean.Input(
                    "global_locking",
                    default=True,
                    tooltip="As you will sample: keys see the prompt with the superclass word in the concept's place.",
                ),
                _sockets.Pictures.Input(
                    "pictures",
                    optional=True,
                    tooltip="What the concept was trained on: the last Training Picture of a chain.",
                ),
                io.Image.Input("references", optional=True, tooltip="The same as a batch, in place of a chain."),
            ],
            outputs=[
                _sockets.Concepts.Output(display_name="concepts", tooltip="The same with the chosen gate."),
                io.Float.Output(display_name="beta", tooltip="The chosen beta."),
                io.Float.Output(display_name="tau", tooltip="The chosen tau."),
                io.Image.Output(display_name="contact_sheet", tooltip="A row of pictures for each pair."),
                io.String.Output(display_name="table", tooltip="Scores of each pair, the front and the choice."),
                io.Image.Output(display_name="plot", tooltip="Likeness over faithfulness, with the Pareto front."),
            ],
        )

    @classmethod
    def validate_inputs(cls, betas=None, taus=None, clip_folder=None, sampler_name=None, scheduler=None) -> bool | str:
        return first_refusal(
            (
                _NO_CLIP if clip_folder == NONE else True,
                known("CLIP folder", clip_folder, network_folders(JUDGES, "clip")),
                _readable(betas, "betas", BETAS),
                _readable(taus, "taus", TAUS),
                _sampling_inputs.known_algorithm(sampler_name, scheduler),
            )
        )

    @classmethod
    def fingerprint_inputs(cls, clip_folder=None, **_others) -> str:
        return folder_version(network_folders(JUDGES, "clip").get(clip_folder))

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        concepts,
        latent_image,
        number,
        prompts,
        negative,
        betas,
        taus,
        clip_folder,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        global_locking,
        pictures=None,
        references=None,
    ) -> io.NodeOutput:
        if clip_folder == NONE:
            raise ConfigError(_NO_CLIP)
        gates = [(b, t) for b in read_values(betas, "betas", BETAS) for t in read_values(taus, "taus", TAUS)]
        lines = prompts_of(prompts, concepts, number)
        avoided = with_words(negative, concepts)
        plain = [in_plain_words(line, concepts) for line in lines]
        each = len(latent_image["samples"])
        count = len(gates) * len(lines) * each
        if not 0 < count <= _MOST:
            raise ConfigError(
                f"{len(gates)} gates with {len(lines)} prompts and {each} pictures of each make {count} pictures, at "
                f"most {_MOST} are possible; give fewer betas, taus or prompts, or a smaller batch"
            )
        real = _real(pictures, references)
        with _host.short_paths():
            judge = chosen_folder(network_folders(JUDGES, "clip"), clip_folder)
        for gated in concepts:
            clip = teach(clip, [gated.concept.embedding], gated.concept.name)
        progress = _host.HostProgress(cls.hidden.unique_id, len(gates) * len(lines) * steps)
        sampled = list(
            sweep(
                model,
                [with_gate(concepts, number, gate) for gate in gates],
                [encode(clip, line, concepts, global_locking=global_locking) for line in lines],
                encode(clip, avoided, concepts, global_locking=global_locking),
                latent_image,
                progress,
                seed=seed,
                steps=steps,
                cfg=cfg,
                sampler_name=sampler_name,
                scheduler=scheduler,
            )
        )
        made = [picture for latents in sampled for picture in decoded(vae, latents)]
        asked = [line for _ in gates for line in plain for _ in range(each)]
        with _host.memory_given_back(), _host.short_paths():
            trials = scored(gates, made, real, asked, judge, progress)

        chosen, table = choose(trials), balance_table(trials)
        rows = [made[first : first + count // len(gates)] for first in range(0, count, count // len(gates))]
        sheet = _host.pictures_to_images([contact_sheet(rows, trials, chosen, plain)])
        plot = _host.pictures_to_images([front_chart(trials, chosen)])
        concepts = with_gate(concepts, number, gates[chosen])
        shown = {"text": [table], **ui.PreviewImage(sheet, cls=cls).as_dict()}
        return io.NodeOutput(concepts, *gates[chosen], sheet, table, plot, ui=shown)


def _readable(text: str | None, name: str, limits: tuple[float, float]) -> bool | str:
    """True when a list of values can be read or is linked, else the sentence to refuse it with."""
    try:
        if text is not None:
            read_values(text, name, limits)
    except ConfigError as error:
        return str(error)
    return True


def _real(pictures: Sequence[Example] | None, references: Tensor | None) -> list[Image.Image]:
    """The concept's own pictures, from the one place that they are given in."""
    if (pictures is None) == (references is None):
        places = "no place" if pictures is None else "two places (pictures, references)"
        raise ConfigError(
            f"the concept's own pictures come from {places}; connect a chain of Training Picture, or references"
        )
    if references is None:
        shown = [example.picture for example in pictures]
    else:
        shown = [Picture.from_tensor(one, f"reference {n}") for n, one in enumerate(_host.image_list([references]), 1)]
    if not shown:
        raise ConfigError("there are no pictures to compare with; connect at least one that the concept was trained on")
    return [picture.open().rgb for picture in shown]
