"""Makes `artifact_v1`: `PYTHONPATH=platform python tests/golden/make_artifact.py FOLDER`.

The committed folder was written once, by the first version that could, and stays: it stands for the artifacts that
users have in their registries. A new schema gets a folder of its own beside it.
"""

from __future__ import annotations

import sys

import torch

from rayscale.contract import Lineage, ModelCard
from rayscale.export import to_onnx
from rayscale.tasks.compact import Compact


def main(folder: str) -> None:
    torch.manual_seed(0)
    task = Compact(scale=2, features=4, blocks=1)
    nets = task.build(torch.device("cpu"))
    for parameter in nets["ema"].parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    lineage = Lineage(recipe="rayscale.recipes.compact:tiny", recipe_digest="0" * 64, images_seen=1)
    card = ModelCard(family="compact", spec=task.specs[""], licence="MIT", lineage=lineage)
    to_onnx(task.shipped(nets)[""], card, folder)


if __name__ == "__main__":
    main(sys.argv[1])
