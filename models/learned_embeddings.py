"""Reading learned tokens in every layout in use: ours, ComfyUI's, the DCO authors', diffusers', A1111's, kohya's."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import ConfigError, FormatError, IncompatibleModelError
from .formats import read_safetensors, read_torch_file, stored_tokens
from .tokens import embedding_stems, plain_name, validate_trigger

ENCODERS = ("clip_l", "clip_g", "clip_h")
ANY = "any"
"""Encoder key of a file that does not name its encoder; the width decides when the token is used."""
BUNDLE = "bundle_emb."
AUTHORS_LORA = "pytorch_lora_weights.safetensors"
"""File in the folder that the DCO authors' trainer writes."""
_AUTHORS_TOKENS = "learned_embeds.safetensors"
_AUTHORS_NAMES = {Path(name).stem for name in (AUTHORS_LORA, _AUTHORS_TOKENS)}


@dataclass(frozen=True)
class LearnedEmbedding:
    """A trigger word and its rows, (rows, dim) for every text encoder."""

    trigger: str
    rows: dict[str, Tensor]

    def fit(self, widths: Mapping[str, int], name: str) -> dict[str, Tensor]:
        """Its rows for each text encoder of a model.

        Args:
            widths: embedding width of each encoder by its key.
            name: file the token comes from, for the message.

        Raises:
            IncompatibleModelError: an encoder has no rows, or rows of another width.
        """
        rows = self.rows
        if set(rows) == {ANY}:  # a file that does not name its encoder fits those of its width
            found = f"one of width {rows[ANY].shape[1]}"
            rows = {key: rows[ANY] for key, width in widths.items() if rows[ANY].shape[1] == width}
        else:
            found = _listed({key: tensor.shape[1] for key, tensor in rows.items()})
        if not widths or any(key not in rows or rows[key].shape[1] != width for key, width in widths.items()):
            raise IncompatibleModelError(
                f"{name}: token {self.trigger} was trained for other text encoders ({found}), but this model has "
                f"{_listed(widths) or 'no CLIP text encoder'}; load the checkpoint family that the token was trained on"
            )
        return {key: rows[key] for key in widths}


def _listed(widths: Mapping[str, int]) -> str:
    return " and ".join(f"{key} of width {width}" for key, width in widths.items())


def as_trigger(name: str) -> str:
    """``dog`` or ``<dog>`` -> ``<dog>``; ConfigError when prompts could not carry it."""
    name = name.strip()
    return validate_trigger(name if name.startswith("<") else f"<{name}>")


def parse_triggers(text: str) -> list[str]:
    """Trigger words from a widget: separated by commas or spaces, angle brackets optional."""
    return [as_trigger(word) for word in re.split(r"[,\s]+", text) if word]


def trigger_of_file(path: Path) -> str:
    """The trigger of a file that names none: its own name, or its folder's for the authors' fixed names."""
    name = path.parent.name if path.stem in _AUTHORS_NAMES else path.stem
    return validate_trigger("<" + (re.sub(r"[\s<>():\\\[\]{},|]+", "-", name).strip("-") or "token") + ">")


def declared_tokens(metadata: Mapping[str, str]) -> list[tuple[str, int | None]]:
    """(trigger, rows) of the tokens that a file of ours says it carries; rows None where it does not say."""
    declared = metadata.get("personalize.tokens", "").strip()
    if not declared.startswith("["):
        return [(trigger, None) for trigger in parse_triggers(declared)]
    return [(token.trigger, token.rows) for token in stored_tokens(metadata)]


def files_of_tokens(path: Path, metadata: Mapping[str, str], find: Callable[[str], Path | None]) -> list[Path]:
    """The embedding files that were saved with a LoRA, in the order of its tokens; empty without any.

    They are searched for LoRAs that say they have tokens, and for the authors' in the same folder.

    Args:
        path, metadata: of the LoRA. A renamed one is looked up under its first name too.
        find: file name -> where it lies, or None.
    """
    if path.name == AUTHORS_LORA and (path.parent / _AUTHORS_TOKENS).is_file():
        return [path.parent / _AUTHORS_TOKENS]
    triggers = [trigger for trigger, _rows in declared_tokens(metadata)]
    for name in dict.fromkeys((path.stem, metadata.get("ss_output_name", path.stem))):
        found = [find(f"{stem}.safetensors") for stem in embedding_stems(name, triggers)]
        if triggers and all(found):
            return found
    return []


def read_learned_embeddings(path: Path, triggers: Sequence[str] = ()) -> list[LearnedEmbedding]:
    """All learned tokens of a file.

    Args:
        path: .safetensors, .pt or .bin.
        triggers: names to use instead of the file's, in its order. The DCO authors' files name none: there
            each trigger takes one row, and without triggers one token takes them all.

    Raises:
        FormatError: nothing of the kind is in the file. ConfigError: the triggers do not suit its rows.
    """
    path = Path(path)
    if path.suffix.lower() in {".safetensors", ".sft"}:
        tensors, metadata = read_safetensors(path)
        return embeddings_from_tensors(path, tensors, metadata, triggers)
    contents = read_torch_file(path)
    if "string_to_param" in contents:  # A1111's layout
        rows = next((value for value in contents["string_to_param"].values() if isinstance(value, Tensor)), None)
        if rows is None:
            raise FormatError(f"{path.name}: string_to_param holds no tensor; the file is damaged")
        return _named({trigger_of_file(path): {ANY: as_rows(rows, path)}}, triggers, path)
    tensors = {str(key): value for key, value in contents.items() if isinstance(value, Tensor)}
    return embeddings_from_tensors(path, tensors, {}, triggers)


def tokens_of_lora(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    files: Sequence[Path],
    triggers: Sequence[str] = (),
) -> list[LearnedEmbedding]:
    """The learned tokens of a LoRA: from ``files``, else those bundled in it; empty for a LoRA without any.

    Args:
        path, tensors, metadata: of the LoRA.
        files: given by hand, or found by files_of_tokens.
        triggers: as for read_learned_embeddings.

    Raises:
        FormatError: the LoRA was trained with tokens that are in neither, or as for one file.
        ConfigError: there is nothing to name by ``triggers``, or they do not suit the rows.
    """
    if files:
        return read_several(files, triggers)
    if any(key.startswith(BUNDLE) for key in tensors):
        return embeddings_from_tensors(path, tensors, metadata, triggers)
    if trained_with := [trigger for trigger, _rows in declared_tokens(metadata)]:
        wanted = " and ".join(f"{stem}.safetensors" for stem in embedding_stems(path.stem, trained_with))
        raise FormatError(
            f"{path.name} was trained with {', '.join(trained_with)}; put {wanted} into the embeddings folder, "
            "so that the words mean in prompts what they meant in training"
        )
    if triggers:
        raise ConfigError(
            f"{path.name} carries no learned tokens, but {', '.join(triggers)} should name some; leave the names "
            "empty, or give the file that holds them"
        )
    return []


def read_several(paths: Sequence[Path], triggers: Sequence[str] = ()) -> list[LearnedEmbedding]:
    """The tokens of several files in their order; ``triggers`` renames all of them. Errors as for one file."""
    if len(paths) == 1:
        return read_learned_embeddings(paths[0], triggers)
    embeddings = [embedding for path in paths for embedding in read_learned_embeddings(path)]
    if not triggers or not embeddings:
        return embeddings
    if len(embeddings) != len(triggers):
        raise ConfigError(
            f"the embedding files hold {len(embeddings)} tokens, but {len(triggers)} were named; name each, or none"
        )
    return [LearnedEmbedding(trigger, found.rows) for trigger, found in zip(triggers, embeddings)]


def embeddings_from_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], triggers: Sequence[str] = ()
) -> list[LearnedEmbedding]:
    """The learned tokens among a file's tensors; arguments and errors as read_learned_embeddings."""
    if bundled := _bundled(tensors, metadata, path):
        return _named(bundled, triggers, path)
    encoders = {key: as_rows(tensors[key], path) for key in ENCODERS if key in tensors}
    if encoders:
        return _split(encoders, declared_tokens(metadata), triggers, path)
    if "emb_params" in tensors:
        return _named({trigger_of_file(path): {ANY: as_rows(tensors["emb_params"], path)}}, triggers, path)
    # diffusers' layout: the key is the token itself.
    tokens = {key: value for key, value in tensors.items() if value.ndim in (1, 2) and "." not in key}
    if not tokens or len(tokens) != len(tensors):
        raise FormatError(
            f"{path.name}: holds no learned tokens; expected clip_l, clip_g or clip_h rows, "
            "bundle_emb entries, or a textual inversion embedding"
        )
    return _named(
        {_safe_trigger(key, path): {ANY: as_rows(value, path)} for key, value in tokens.items()}, triggers, path
    )


def as_rows(rows: Any, path: Path) -> Tensor:
    """Rows of a file as (rows, dim) float32; FormatError when they are none."""
    if not isinstance(rows, Tensor):
        raise FormatError(f"{path.name}: the rows of a learned token are no tensor; the file is damaged")
    if rows.ndim not in (1, 2) or not rows.numel() or not rows.is_floating_point():
        shape = "×".join(map(str, rows.shape)) or "a single number"
        raise FormatError(
            f"{path.name}: the rows of a learned token are {shape} of {rows.dtype}, expected a vector or a matrix of "
            "floats; the file is damaged, download it again"
        )
    rows = rows.detach().float()
    if not rows.isfinite().all():
        raise FormatError(f"{path.name}: a learned token holds values that are no numbers; train it again")
    return rows.reshape(-1, rows.shape[-1])


def _safe_trigger(name: str, path: Path) -> str:
    try:
        return as_trigger(name)
    except ConfigError:
        return trigger_of_file(path)


def _bare(name: str) -> str:
    return name.strip("<>")


def _bundled(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, dict[str, Tensor]]:
    """Tokens kept inside a LoRA file as bundle_emb.<name>.<encoder>, by trigger."""
    declared = [trigger for trigger, _rows in declared_tokens(metadata)]
    names = {spell(trigger).lower(): trigger for spell in (plain_name, _bare) for trigger in declared}
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(BUNDLE):
            continue
        # A1111 writes bundle_emb.<name>.string_to_param.*, kohya's and OneTrainer's end in the encoder.
        name, _, entry = key[len(BUNDLE) :].replace(".string_to_param", "").rpartition(".")
        encoder = entry if entry in ENCODERS else ANY
        trigger = names.get(_bare(name).lower()) or as_trigger(_bare(name))
        found.setdefault(trigger, {})[encoder] = as_rows(value, path)
    return found


def _split(
    encoders: dict[str, Tensor], declared: list[tuple[str, int | None]], triggers: Sequence[str], path: Path
) -> list[LearnedEmbedding]:
    """Divide the rows of a clip_l/clip_g file among its tokens."""
    total = len(next(iter(encoders.values())))
    names = list(triggers) or [trigger for trigger, _rows in declared] or [trigger_of_file(path)]
    counts = [rows for _trigger, rows in declared]
    if len(counts) != len(names) or None in counts:
        counts = [total] if len(names) == 1 else [1] * len(names)
    if sum(counts) != total or any(len(rows) != total for rows in encoders.values()):
        raise ConfigError(
            f"{path.name} holds {total} rows, but {len(names)} tokens ({', '.join(names)}) want {sum(counts)}; "
            "name one token for all rows, or one for each row, in the order of training"
        )
    embeddings, start = [], 0
    for name, count in zip(names, counts, strict=True):
        embeddings.append(LearnedEmbedding(name, {key: rows[start : start + count] for key, rows in encoders.items()}))
        start += count
    return embeddings


def _named(found: dict[str, dict[str, Tensor]], triggers: Sequence[str], path: Path) -> list[LearnedEmbedding]:
    if triggers and len(triggers) != len(found):
        raise ConfigError(
            f"{path.name} holds {len(found)} tokens ({', '.join(found)}), but {len(triggers)} names were given; "
            "give one name for each, or none"
        )
    return [LearnedEmbedding(name, rows) for name, rows in zip(triggers or found, found.values(), strict=True)]
