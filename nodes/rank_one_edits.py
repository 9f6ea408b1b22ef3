"""Perfusion's edits in the host's UNet: hooks on cross-attention's projections for the time of one sampling run.

A projection gets its input without the concepts' directions, and its output what the gates let through. Both depend on
the prompt alone, so they are made once for the run. The hooks do nothing but in calls that go through our wrapper.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from comfy.utils import repeat_to_batch_size
from torch import Tensor, nn

from ..models.errors import ConfigError
from ..models.perfusion import KEY as KEYS
from ..models.perfusion import VALUE as VALUES
from ..models.perfusion import Concept, EditSpace, Scores, edit_space, edited_input, gated_outputs
from .guiding import SigmaRange
from .switchable_lora import call_options, require_unet
from .unet_names import host_names

KEY = "personalize_rank_one_edits"
"""Key of our wrappers on a MODEL."""
TAG = "personalize_superclass"
"""Entry of a conditioning: the encoding of its prompt with the superclass words, (batch, tokens, dim), for keys."""
TAG_OF = "personalize_superclass_of"
"""Entry beside it: the encoding that it was made for, by which a change of the conditioning is noticed."""
_TAGS, _RUN = "personalize_superclass_tags", "personalize_rank_one_run"  # entries of the host's transformer_options


@dataclass(frozen=True)
class GatedConcept:
    """A concept and the gate that it opens."""

    concept: Concept
    beta: float
    tau: float
    gated_removal: bool = False
    """As of models.perfusion.Target."""


@dataclass
class _Run:
    """What is made once for a sampling run."""

    sampling: Any
    """The host's model_sampling."""
    hooks: ExitStack
    """Takes the run's hooks away again."""
    changes: bool = False
    """Whether conditionings have hooks of the host's, under which weights change from call to call."""
    passing: bool = False
    """Whether a node stands between the sampler and the UNet, which may give it other prompts from call to call."""
    made: dict[tuple, Any] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    """Projection -> target output of each concept."""
    calls: dict["RankOneEdits", "_Call"] = field(default_factory=dict)
    """The calls of the UNet that are under way."""

    def __deepcopy__(self, memo: dict) -> "_Run":
        return self

    def has_own_prompt(self, position: int, cond: Mapping[str, Any]) -> bool:
        """Whether a conditioning of the list at ``position`` still has the prompt that it was made for.

        For an area of one list the host adds an entry to the others: a copy with their prompt in it. Zeroes have no
        keys to lock.

        Raises:
            ConfigError: another node has changed the prompt, so that its superclass prompt is none of it any more.
        """
        key = ("own prompt", position, cond["uuid"])
        if key not in self.made:  # prompts stay the same for the run, and comparing them waits for the device
            seen, own, known = (prompt.cpu() for prompt in (_prompt(cond).cond, cond["cross_attn"], cond[TAG_OF]))
            if own.any() and not torch.equal(own, known):
                raise ConfigError(_SEPARATED)
            self.made[key] = torch.equal(seen, known)
        return self.made[key]


def _prompt(cond: Mapping[str, Any]) -> Any:
    """What the UNet's cross-attention reads under a conditioning: the host's object, or None."""
    return cond.get("model_conds", {}).get("c_crossattn")


_SEPARATED = (
    "a prompt and its superclass prompt do not belong together any more, because another node changed one of them; "
    "connect Perfusion Text Encode directly to the sampler"
)


class RankOneEdits:
    """A wrapper of the UNet's forward. What belongs to a run is in its `_Run`, so clones and threads may share this."""

    def __init__(self, model, concepts: Sequence[GatedConcept], within: SigmaRange):
        self.concepts = tuple(concepts)
        self.within = within
        self.space: EditSpace = edit_space(
            [gated.concept for gated in concepts],
            [gated.beta for gated in concepts],
            [gated.tau for gated in concepts],
            [gated.gated_removal for gated in concepts],
        )
        names = host_names(model)
        self.projections = {name: own for name, own in names.items() if name.endswith((KEYS, VALUES))}
        """Diffusers' name -> the host's."""

    def __deepcopy__(self, memo: dict) -> "RankOneEdits":
        return self

    def __call__(self, executor, x: Tensor, *args, **kwargs) -> Tensor:
        """Run the UNet; x is (rows, channels, height, width)."""
        options = call_options(args, kwargs)
        run, sigmas = options.get(_RUN), options.get("sigmas")
        if run is not None and sigmas is not None and not self.within.holds(run.sampling, sigmas):
            return executor(x, *args, **kwargs)
        with ExitStack() as call:
            if run is None:  # called by a node that samples in a way of its own
                run = _Run(None, call)
            now = _Call(self, options, run)
            if torch.is_grad_enabled():  # then blocks may be recomputed when this call is long over
                self._hook(executor.class_obj, call, lambda: now)
            else:
                if (self, executor.class_obj) not in run.made:
                    run.made[self, executor.class_obj] = True
                    self._hook(executor.class_obj, run.hooks, lambda: run.calls.get(self))
                run.calls[self] = now
                call.callback(run.calls.pop, self)
            return executor(x, *args, **kwargs)

    def _hook(self, unet: nn.Module, stack: ExitStack, current: Callable[[], "_Call | None"]) -> None:
        """Put hooks on the projections until the stack unwinds; they ask which call they serve."""
        for name, own in self.projections.items():
            module = unet.get_submodule(own)
            before, after = _hooks(current, name, module)
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)


def _hooks(current: Callable[[], "_Call | None"], name: str, module: nn.Module) -> tuple[Callable, Callable]:
    """What runs before and after a projection."""
    keys = name.endswith(KEYS)

    def before(_module: nn.Module, args: tuple) -> tuple | None:
        call = current()
        return None if call is None else (call.edited(keys, args[0]), *args[1:])

    def after(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
        call = current()
        return None if call is None else output + call.answer(name, keys, module, output)

    return before, after


class _Call:
    """What the hooks need to know of one call of the UNet."""

    def __init__(self, edits: RankOneEdits, options: Mapping[str, Any], run: _Run):
        self.edits, self.run = edits, run
        # The host copies conditionings from one list to another, uuid included: only the list tells them apart.
        ids = options.get("uuids") or (None,)
        self.chunks = tuple(zip(options.get("cond_or_uncond") or [0] * len(ids), ids, strict=True))
        tags = options.get(_TAGS, {})
        self.superclass = [tags.get(chunk) for chunk in self.chunks]
        self.has_superclass = any(rows is not None for rows in self.superclass)
        # Patches of other nodes may change the context from step to step and from layer to layer, windows cut it out of
        # a longer one; without uuids nobody knows.
        changing = any(name.startswith("attn2") for name in options.get("patches", ())) or "context_window" in options
        passing = changing or run.changes or run.passing or self.chunks[0][1] is None
        self.kept: dict | None = None if passing else run.made.setdefault((edits, self.chunks), {})
        """What was made of these prompts in the run, beside the layout that it was made for."""
        self.inputs: dict[bool, tuple[Tensor, Tensor, Scores]] = {}
        """What was read, what it was edited to and what that took away, where it is the superclass prompt's (True) and
        where it is the prompt itself: all layers read the same."""

    def _once(self, key: Any, like: Tensor, make: Callable[[], Any]) -> Any:
        """Something made for tensors like this one; many calls a step ask for it."""
        if self.kept is None:
            return make()
        layout = (like.shape, like.dtype, like.device)
        known = self.kept.get(key)
        if known is None or known[0] != layout:
            known = self.kept[key] = (layout, make())
        return known[1]

    def edited(self, keys: bool, context: Tensor) -> Tensor:
        """What a projection, of keys or of values, reads in the context's place."""
        locked = keys and self.has_superclass
        if locked not in self.inputs or self.inputs[locked][0] is not context:
            self.inputs[locked] = (context, *self._input(context, locked))
        return self.inputs[locked][1]

    def answer(self, name: str, keys: bool, module: nn.Module, output: Tensor) -> Tensor:
        """What is added to a projection's output."""
        scores = self.inputs[keys and self.has_superclass][2]
        return self._once(name, output, lambda: self._output(name, module, output, scores))

    def _input(self, context: Tensor, locked: bool) -> tuple[Tensor, Scores]:
        """The encodings without what they have of the concepts, and what that was."""

        def make() -> tuple[Tensor, Scores]:
            seen = self._superclass(context) if locked else context
            scores = self.edits.space.measure(seen)
            return edited_input(seen, scores, self.edits.space), scores

        return self._once(locked, context, make)

    def _superclass(self, context: Tensor) -> Tensor:
        """The context, in rows that have one with the encoding of the superclass prompt."""
        tokens, batch = context.shape[1], len(context) // len(self.chunks)
        rows = list(context.split(batch))
        for index, encoding in enumerate(self.superclass):
            if encoding is not None:
                times, rest = divmod(tokens, encoding.shape[1])
                if rest:
                    raise ConfigError(_SEPARATED)
                rows[index] = repeat_to_batch_size(encoding.to(context).repeat(1, times, 1), batch)
        return torch.cat(rows)

    def _output(self, name: str, module: nn.Module, like: Tensor, scores: Scores) -> Tensor:
        """What the gates let through, (rows, tokens, out)."""

        def project(rows: Tensor) -> Tensor:  # past hooks, yet through the host's casts and patches
            return type(module).forward(module, rows.to(like)).float()

        if name not in self.run.outputs or self.run.changes:
            concepts = [gated.concept for gated in self.edits.concepts]
            self.run.outputs[name] = [concept.target_output(name, project) for concept in concepts]
        outputs = self.run.outputs[name] = [rows.to(like.device) for rows in self.run.outputs[name]]
        return gated_outputs(scores, outputs).to(like.dtype)


def check_fit(model, concept: Concept) -> None:
    """Raise IncompatibleModelError unless the concept was trained for this MODEL's UNet."""
    require_unet(model, f"{concept.name} needs", "use another method")
    network = model.model.diffusion_model
    projections = {name: own for name, own in host_names(model).items() if name.endswith((KEYS, VALUES))}
    concept.check_fit({name: network.get_submodule(own).weight.shape for name, own in projections.items()})


def attach(model, concepts: Sequence[GatedConcept], within: SigmaRange):
    """A clone of the MODEL under the edits of these concepts."""
    if model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        raise ConfigError(
            "this model carries Perfusion concepts already, and concepts have to know of each other; chain the Load "
            "Perfusion Concept nodes, and apply them once"
        )
    for gated in concepts:
        check_fit(model, gated.concept)
    edits = RankOneEdits(model, concepts, within)
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, edits)
    model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _start_run)
    model.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _carry_tags)
    return model


def _start_run(executor, guider, sigmas, extra_args, *args, **kwargs):
    options = extra_args["model_options"].setdefault("transformer_options", {})
    changes = any("hooks" in cond for entries in guider.conds.values() for cond in entries or ())
    with ExitStack() as hooks:
        wrapped = "model_function_wrapper" in extra_args["model_options"]
        options[_RUN] = _Run(guider.inner_model.model_sampling, hooks, changes, wrapped)
        return executor(guider, sigmas, extra_args, *args, **kwargs)


def _carry_tags(executor, model, conds, x, timestep, model_options, *args, **kwargs):
    options = model_options.get("transformer_options", {})
    run = options.get(_RUN) or _Run(None, ExitStack())
    tags = {}
    for position, entries in enumerate(conds):
        own = [cond for cond in entries or () if TAG in cond and run.has_own_prompt(position, cond)]
        locked = {id(_prompt(cond)): cond[TAG] for cond in own}
        # An entry that was added for an area of another list has the prompt of one of these, and nothing else of it.
        tags |= {
            (position, cond["uuid"]): locked[id(_prompt(cond))] for cond in entries or () if id(_prompt(cond)) in locked
        }
    if tags:
        model_options = {**model_options, "transformer_options": {**options, _TAGS: tags}}
    return executor(model, conds, x, timestep, model_options, *args, **kwargs)
