"""Training from a command line: python -m comfyui_personalize.trainers <recipe> --config file.toml [key=value ...]."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from ..models.errors import PersonalizeError
from .config import apply_overrides, read_toml
from .progress import TerminalProgress
from .ranks import DistributedRanks, Ranks
from .registry import RECIPES

EXAMPLE = "python -m comfyui_personalize.trainers dco --config my_dog.toml train.steps=500"


def main(words: Sequence[str] | None = None) -> int:
    """Run a recipe; 0 when it is done, 1 after an error that the user can mend, 130 when it was cancelled."""
    parser = argparse.ArgumentParser(prog="personalize-train", description=__doc__, epilog=f"Example: {EXAMPLE}")
    parser.add_argument("recipe", choices=sorted(RECIPES), help="what to run")
    parser.add_argument("--config", required=True, help="TOML file; the recipe's folder has an example.toml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    arguments = parser.parse_intermixed_args(words)
    progress = TerminalProgress()
    previous = signal.signal(signal.SIGINT, progress.interrupt)
    try:
        values = apply_overrides(read_toml(arguments.config), arguments.overrides)
        recipe = importlib.import_module(f".{RECIPES[arguments.recipe]}", __package__)
        return recipe.run(values, progress, _ranks(values))
    except PersonalizeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGINT, previous)


def _ranks(values: dict) -> Ranks:
    """The processes of ``accelerate launch``, or a single one; the state is asked for no precision of its own."""
    from accelerate import PartialState

    state = PartialState(cpu=values.get("device") == "cpu")
    return DistributedRanks(state) if state.num_processes > 1 else Ranks()


if __name__ == "__main__":
    sys.exit(main())
