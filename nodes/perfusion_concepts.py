"""Chains of Perfusion concepts: loaded, joined, with words of their own, and described."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from comfy_api.latest import io

from ..models.errors import ConfigError
from ..models.perfusion import Concept, read_concept
from ..models.perfusion.summary import describe_company, describe_concept
from ..models.tokens import plain_name
from . import _host, _sockets
from ._choices import first_refusal, known
from ._folders import CONCEPTS
from .rank_one_edits import GatedConcept

EVERYWHERE, BY_THE_GATE = "everywhere", "where the gate opens"


class LoadPerfusionConcept(io.ComfyNode):
    """One concept with its gate, after those before it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeLoadPerfusionConcept",
            display_name="Load Perfusion Concept",
            category="personalize/perfusion",
            description="Loads a concept, ours or a .ckpt of the authors. Chain several for several concepts in one "
            "picture.",
            inputs=[
                io.Combo.Input(
                    "concept_name",
                    options=_host.model_files(CONCEPTS),
                    tooltip="The file, in models/perfusion_concepts.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.65,
                    min=-2.0,
                    max=4.0,
                    step=0.01,
                    tooltip="From which resemblance on the concept acts: lower looks more like the pictures, higher "
                    "obeys the prompt more. The authors sample with 0.6 to 0.7; trained with 0.75.",
                ),
                io.Float.Input(
                    "tau",
                    default=0.15,
                    min=0.001,
                    max=2.0,
                    step=0.001,
                    tooltip="Softness of that limit. The authors sample with 0.15; trained with 0.1.",
                ),
                io.Boolean.Input(
                    "enabled", default=True, tooltip="Off leaves the concept out; its word is then only a word."
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip="Word to use in prompts instead of the file's, such as <teddy>. Usually empty.",
                ),
                io.Combo.Input(
                    "removal",
                    options=[EVERYWHERE, BY_THE_GATE],
                    default=EVERYWHERE,
                    optional=True,
                    tooltip="Which words lose what they have of the concept's direction. Everywhere is the paper's and "
                    "what concepts are trained with; where the gate opens leaves words for which the gate is closed as "
                    "they are, so that a very high beta switches the concept off.",
                ),
                _sockets.Concepts.Input("concepts", optional=True, tooltip="Concepts loaded before this one."),
            ],
            outputs=[
                _sockets.Concepts.Output(display_name="concepts"),
                io.String.Output(display_name="tokens", tooltip="The words of all concepts, separated by commas."),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept_name=None, removal=None) -> bool | str:
        chosen = known("concept", concept_name, _host.model_files(CONCEPTS))
        return first_refusal([chosen, known("removal", removal, [EVERYWHERE, BY_THE_GATE])])

    @classmethod
    def fingerprint_inputs(cls, concept_name=None, **_others) -> str:
        return _host.model_version(CONCEPTS, concept_name)

    @classmethod
    def execute(cls, concept_name, beta, tau, enabled, trigger="", removal=EVERYWHERE, concepts=()) -> io.NodeOutput:
        loaded = tuple(concepts)
        if enabled:
            with _host.short_paths():
                concept = read_concept(_host.model_path(CONCEPTS, concept_name), trigger.strip())
            loaded = joined(loaded, [GatedConcept(concept, beta, tau, removal == BY_THE_GATE)])
        return io.NodeOutput(loaded, words_of(loaded))


class InspectPerfusionConcepts(io.ComfyNode):
    """What concepts are, and two chains as one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PersonalizeInspectPerfusionConcepts",
            display_name="Merge and Inspect Perfusion Concepts",
            category="personalize/perfusion",
            description="Joins two chains of concepts into one, and tells of each its word, superclass, sizes, "
            "covariance, gate and training, and how alike they are.",
            is_output_node=True,
            inputs=[
                _sockets.Concepts.Input("concepts", tooltip="From Load Perfusion Concept."),
                _sockets.Concepts.Input(
                    "more", optional=True, tooltip="Another chain; its concepts come behind, {3} after {1} and {2}."
                ),
            ],
            outputs=[
                _sockets.Concepts.Output(display_name="concepts", tooltip="All concepts of both chains."),
                io.String.Output(display_name="tokens", tooltip="Their words, separated by commas."),
                io.String.Output(display_name="text", tooltip="What they are, in Markdown."),
            ],
        )

    @classmethod
    def execute(cls, concepts, more=()) -> io.NodeOutput:
        together = joined(concepts, more)
        if not together:
            raise ConfigError("there are no concepts; switch at least one Load Perfusion Concept on")
        parts = [describe_concept(one.concept, one.beta, one.tau, one.gated_removal) for one in together]
        if len(together) > 1:
            parts.append(describe_company([gated.concept for gated in together]))
        text = "\n\n".join(parts)
        return io.NodeOutput(together, words_of(together), text, ui={"text": [text]})


def joined(concepts: Sequence[GatedConcept], more: Sequence[GatedConcept]) -> tuple[GatedConcept, ...]:
    """Both chains; a word that is taken is numbered, and the log says so, as the authors' code does.

    Raises:
        ConfigError: a concept is in both, whatever its words: its gates open together, and it answers twice.
    """
    together = tuple(concepts)
    for gated in more:
        concept = gated.concept
        for one in together:
            if _same_concept(one.concept, concept):
                raise ConfigError(
                    f"{concept.name} is in the chain already, as {one.concept.trigger} of {one.concept.name}, and "
                    "would answer twice; choose another file, or leave it out of one of the two places"
                )
        free = _free_word(concept.trigger, [one.concept.trigger for one in together])
        if free != concept.trigger:
            logging.warning("%s: the word %s is taken, use %s", concept.name, concept.trigger, free)
            renamed = replace(concept, embedding=replace(concept.embedding, trigger=free))
            gated = replace(gated, concept=renamed)
        together = (*together, gated)
    return together


def words_of(concepts: Sequence[GatedConcept]) -> str:
    """The words of a chain, separated by commas."""
    return ", ".join(gated.concept.trigger for gated in concepts)


def _same_concept(first: Concept, second: Concept) -> bool:
    """Whatever the files are called: two trainings never end at the same place."""
    places = first.parts.target_input, second.parts.target_input
    return len(places[0]) == len(places[1]) and torch.equal(*places)


def _free_word(trigger: str, taken: list[str]) -> str:
    """The word itself, or the first numbered one that no other concept has; prompts ignore case."""
    used, word, number = {one.lower() for one in taken}, trigger, 2
    while word.lower() in used:
        word, number = f"<{plain_name(trigger)}-{number}>", number + 1
    return word
