"""Which pictures of the class a training preserves: the dataset's, or such as the base model draws beforehand."""

import warnings
from dataclasses import replace

from ...models.errors import ConfigError, DatasetError
from ..base import TrainingBase
from ..class_pictures import ClassPictures
from ..dataset import Dataset
from ..devices import is_out_of_memory, out_of_memory, resolve_precision
from ..output import OutputPlace
from ..prepared import Surroundings
from ..progress import FollowerProgress, SilentProgress
from ..ranks import Ranks
from .config import PriorConfig


def with_class_pictures(
    config: PriorConfig, base: TrainingBase, dataset: Dataset, place: OutputPlace, around: Surroundings
) -> tuple[Dataset, Surroundings]:
    """The dataset with as many class pictures as asked for, and surroundings in which they are drawn if need be.

    They are drawn, once for all runs of one folder, when everything that can be checked beforehand has been. Warns of
    a prompt that nothing is drawn of.

    Raises:
        DatasetError: the dataset has class pictures, but fewer.
        ConfigError: there is nothing to draw.
    """
    count, own = config.class_pictures, len(dataset.class_examples)
    if not count:
        if config.class_prompt.strip() and not own and (around.ranks or Ranks()).is_writer:
            warnings.warn(
                "class_prompt has no effect while class_pictures is 0 and the dataset has no class pictures; set "
                "class_pictures, such as to 200, for the base model to draw them",
                stacklevel=2,
            )
        return dataset, around
    if own:
        if own < count:
            raise DatasetError(
                f"the dataset has {own} class pictures and class_pictures asks for {count}; add more, ask for fewer, "
                "or give no class folder and let the base model draw them"
            )
        return replace(dataset, class_examples=dataset.class_examples[:count]), around
    if not config.class_prompt.strip():
        raise ConfigError(
            f"class_pictures asks for {count} and the dataset has none; write class_prompt, such as a photo of a dog, "
            "for the base model to draw them, or choose a class folder"
        )
    precision = resolve_precision(config.precision, around.device)
    pictures = ClassPictures(
        base,
        place.run_folder.parent / "class_pictures",
        count,
        config.class_prompt.strip(),
        steps=config.class_steps,
        side=config.resolution or base.family.resolution,
        seed=config.seed,
        precision=precision,
    )
    ranks, progress = around.ranks or Ranks(), around.progress or SilentProgress()
    if not ranks.is_writer:
        progress = FollowerProgress(progress)

    def before_loading() -> None:
        if around.before_loading is not None:
            around.before_loading()
        try:
            pictures.draw(around.device, progress, ranks, at_once=config.batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            resolved = replace(config, precision=precision)
            raise out_of_memory(resolved, "while drawing pictures of the class") from error

    return pictures.added_to(dataset), replace(around, before_loading=before_loading)
