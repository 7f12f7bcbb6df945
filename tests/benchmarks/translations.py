"""Are translations what their source's labels say? An independent classifier, trained on the target's labels for this alone, judges.

Run: python -m tests.benchmarks.translations RUN [RUN ...] [--storage runs] [--dataset FOLDER] [--steps 1000] [--seed 0]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data.manifest import Manifest
from data.transforms import random_view, seeded_generator
from models.networks.build import build_network
from models.networks.layers import CodesOnly
from pipelines.retrieval.evaluation import encode_split
from pipelines.retrieval.metrics import Encoded
from pipelines.training import runs
from pipelines.translate import load_generator, translate_all

BATCH, BITS = 128, 128


def rows(root: Path, manifest: Manifest, name: str) -> Encoded:
    """Labels of DOMAIN/SPLIT and, as codes, its images."""
    return encode_split(lambda x: x, root, manifest, name)


def train_judge(x: np.ndarray, labels: np.ndarray, classes: int, steps: int, seed: int) -> nn.Module:
    """A LeNet or conv4 with batch-norm and dropout, trained with cross-entropy on randomly transformed views.

    Args:
        x: (n, channels, h, w) uint8.
        labels: (n,).

    Returns:
        Module of images (batch, channels, h, w) uint8 -> logits (batch, classes), in evaluation mode.
    """
    torch.manual_seed(seed)
    judge = nn.Sequential(CodesOnly(build_network("auto", x.shape[1:], BITS, True, 0.3, "none")), nn.Linear(BITS, classes))
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, truth, random = torch.from_numpy(x), torch.from_numpy(labels), seeded_generator(seed)
    for _ in range(steps):
        chosen = torch.randint(len(x), (BATCH,), generator=random)
        loss = cross_entropy(judge(random_view(images[chosen], random)), truth[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


@torch.no_grad()
def agreement(judge: nn.Module, x: np.ndarray, labels: np.ndarray, classes: int) -> tuple[float, list[float]]:
    """Share of the images that the judge gives their label, of all and of each class."""
    guesses: Tensor = torch.cat([judge(part).argmax(1) for part in torch.from_numpy(x).split(512)])
    right = guesses.numpy() == labels
    return float(right.mean()), [float(right[labels == each].mean()) for each in range(classes)]


def judge_run(folder: Path, given: argparse.Namespace, judges: dict[str, nn.Module]) -> None:
    """Print the judge's agreement with the labels of target images, source images and translated source images; ``judges`` keeps it for its target."""
    method, _ = load_generator(folder)
    config = runs.read_json(folder / "config.json")
    root = Path(given.dataset or config["dataset"])
    manifest = Manifest.read(root)
    target, classes = config["target"], len(manifest.classes)
    source, real = rows(root, manifest, f"{config['source']}/test"), rows(root, manifest, f"{target}/test")
    if target not in judges:
        print(f"training the judge of {target}", file=sys.stderr)
        labelled = rows(root, manifest, f"{target}/train")
        judges[target] = train_judge(labelled.codes, labelled.labels, classes, given.steps, given.seed)
    print(f"\n{folder.name}: share of images that the judge of {target} (trained with its labels: oracle) gives their label")
    shown = {
        f"{target} test images": (real.codes, real.labels),
        f"{config['source']} test images as they are": (source.codes, source.labels),
        f"{config['source']} test images, translated": (translate_all(method, source.codes), source.labels),
    }
    for what, (x, labels) in shown.items():
        share, each = agreement(judges[target], x, labels, classes)
        print(f"  {what:<40}{share:.4f}   by class {' '.join(f'{value:.3f}' for value in each)}")


def main() -> None:
    """Judge each run that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="+", help="ids of runs that generate images")
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--dataset", default="", help="folder of the dataset (default: the run's)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the judge's training")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    judges: dict[str, nn.Module] = {}
    try:
        for name in given.run:
            judge_run(runs.find_run(name, given.storage), given, judges)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
