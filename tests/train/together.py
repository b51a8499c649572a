"""What several processes do, run by torchrun from test_parallel.py. Each prints nothing; rank 0 writes DIR/found.json."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
from tests_train_conftest import Listener, tiny_recipe

from shoal.train import measure
from shoal.train.loop import train
from shoal.train.process import launched
from shoal.train.recipe import ParallelSettings


def main(folder: Path) -> None:
    measure.PROBE_SIDE, measure.PROBE_SECONDS = 16, 0.0
    recipe = tiny_recipe(folder / "data", precision="fp32")
    with launched() as process:
        for ep in (1, 2):
            listener = Listener()
            train(replace(recipe, parallel=ParallelSettings(expert=ep)), folder / f"ep{ep}", listener, process=process)
            if process.leads:
                print(
                    [(r["step"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in listener.records],
                    listener.notes,
                )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
