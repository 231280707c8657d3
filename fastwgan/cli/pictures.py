"""Pictures of a run: generated samples and training curves. Needs Pillow and matplotlib."""

import csv
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, path: Path) -> None:
    """Write gray or RGB images [N, C, H, W] in [-1, 1] as a near-square grid with white lines between them."""
    pixels = images.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    n, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(n))
    canvas = np.full((math.ceil(n / columns) * (height + 1) + 1, columns * (width + 1) + 1, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        canvas[top : top + height, left : left + width] = image
    scale = max(1, 640 // canvas.shape[1])
    Image.fromarray((canvas[..., 0] if channels == 1 else canvas).repeat(scale, 0).repeat(scale, 1)).save(path)


def points(generated: Tensor, real: Tensor | None, path: Path) -> None:
    """Write generated points [N, D] over real ones [M, D]: their first two coordinates, or a histogram of the one."""
    figure, line = Figure(figsize=(6, 6), dpi=110, layout="constrained"), generated.shape[1] == 1
    axes = figure.add_subplot(xlabel="x", ylabel="density" if line else "y", aspect="auto" if line else "equal")
    clouds = [] if real is None else [(real, f"real ({len(real)})", "0.75", 1.0)]
    for cloud, label, color, alpha in (*clouds, (generated, f"generated ({len(generated)})", "tab:orange", 0.6)):
        columns = cloud.float().cpu().T.numpy()
        if line:
            axes.hist(columns[0], bins=100, density=True, color=color, alpha=alpha, label=label)
        else:
            axes.scatter(columns[0], columns[1], s=6, c=color, alpha=alpha, linewidths=0, label=label)
    axes.legend(loc="upper right", markerscale=2)
    figure.savefig(path)


def curves(log: Path, path: Path) -> None:
    """Draw ``metrics.csv``: the Wasserstein estimate, and under it the penalty or the clip's saturation."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    penalised = any(row["penalty"] for row in rows)
    lower = ("penalty", "penalty, unweighted") if penalised else ("saturation", "share of weights on the bound")
    drawn = (("wasserstein", "Wasserstein estimate"), lower)
    for axes, (column, label) in zip(figure.subplots(2, 1, sharex=True), drawn, strict=True):
        there = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
        axes.plot(*zip(*there, strict=True), linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.set_xlabel("critic step")
    figure.savefig(path)
