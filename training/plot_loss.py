"""Draws the loss curves of a training run: `python -m training.plot_loss LOSS_CSV PNG`."""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CURVES = {
    "train_loss": ("training batch", "#9a9a9a"),
    "held_out_loss": ("held-out phrasings", "#1f5fa8"),
    "held_out_loss_sym_int4": ("held-out phrasings, weights rounded to sym_int4", "#d1662b"),
}


def plot(log: Path, image: Path) -> None:
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for column, (label, color) in CURVES.items():
        axes.plot(tokens, [float(row[column]) for row in rows], label=label, color=color, linewidth=1.2)
    axes.set(xlabel="tokens seen (millions)", ylabel="cross-entropy of answer tokens (nats)", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log", type=Path, metavar="LOSS_CSV")
    parser.add_argument("image", type=Path, metavar="PNG")
    arguments = parser.parse_args()
    plot(arguments.log, arguments.image)


if __name__ == "__main__":
    main()
