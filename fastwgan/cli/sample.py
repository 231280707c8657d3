"""fastwgan sample: draw samples from a trained generator."""

import argparse
from pathlib import Path

import numpy as np
import torch

from fastwgan import checkpoint
from fastwgan.cli.common import MOST, SEED, Options, integer, problems
from fastwgan.cli.runs import Config, recipe_for
from fastwgan.streams import Stream, stream_seed

AT_ONCE = 500  # samples that one forward pass makes
OPTIONS: Options = {
    "--checkpoint": {"type": Path, "required": True, "help": "a last.pt of fastwgan train"},
    "--ema": {"action": "store_true", "help": "by the running average of the generator's weights"},
    "--count": {"type": integer(1, MOST), "default": 100},
    "--seed": {"type": SEED, "default": 0},
    "--out": {"type": Path, "required": True, "help": "F.npy for the numbers, F.png for a picture"},
}


def run(args: argparse.Namespace) -> int:
    with problems():
        if args.out.suffix not in (".npy", ".png"):
            raise ValueError(f"--out: expected a name ending in .npy or .png, got {args.out}")
        content = checkpoint.load(args.checkpoint)
        config = Config.of(content, args.checkpoint)
        generator = config.make_networks()[0].eval()
        generator.load_state_dict(content["trainer"]["generator"])
        if args.ema and config.ema is None:
            raise ValueError(f"--ema: {args.checkpoint} is of a run without")
        if args.ema:
            generator.load_state_dict(content["trainer"]["ema"], strict=False)  # buffers stay the generator's
    random = torch.Generator().manual_seed(stream_seed(args.seed, Stream.DRAW))
    latents = torch.randn(args.count, recipe_for(config.shape).latent, generator=random)
    with torch.no_grad():
        samples = torch.cat([generator(z) for z in torch.split(latents, AT_ONCE)])
    if args.out.suffix == ".npy":
        np.save(args.out, samples.numpy())
    else:
        with problems():
            config.draw(samples, args.out, seed=args.seed)
    print(f"{args.count} samples of shape {tuple(samples.shape[1:])}: {args.out}")
    return 0
