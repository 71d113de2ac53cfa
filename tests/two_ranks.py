"""Run by torchrun: trains, and writes every process's parameters beside the run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from featureinterp.training import recipe
from featureinterp.training.settings import load_recipe

out = Path(sys.argv[2])
finish = recipe.run


def and_keep(trainer, *args, **options):
    finish(trainer, *args, **options)
    save_file(
        {k: v.contiguous() for k, v in trainer.model.state_dict().items()},
        out / f"rank{os.environ['RANK']}.safetensors",
    )


recipe.run = and_keep
recipe.train(load_recipe(sys.argv[1]), out)
