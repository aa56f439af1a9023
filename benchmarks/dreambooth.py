"""One subject from a few photographs on the tiny SDXL, with and without prior preservation.

For each folder of photographs: the loss on photographs kept back, before and after; and how far the pictures that the
base draws of something else, at the same noise, have moved, which is what prior preservation is there to keep small.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from machine import describe, machine
from PIL import Image

from lowrank_diffusion.infer.request import Request
from lowrank_diffusion.infer.run import infer
from lowrank_diffusion.infer.studio import Told
from lowrank_diffusion.load import load_config
from lowrank_diffusion.results import RunSummary, Silent
from lowrank_diffusion.run import run

CLASS = "a yellow circle on a blue background"
"""Something that the tiny SDXL draws well."""
PICTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="PHOTOGRAPHS", help="a folder of a subject")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new; gets runs and pictures")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    print(describe(machine()))
    rows: list[dict[str, object]] = []
    print("| subject | prior preservation | seed | held-out loss without | with adapter | class pictures moved |")
    print("|---|---|---|---|---|---|")
    for folder in given.folders:
        for seed in given.seeds:
            for weight in (None, 1.0):
                out = given.out / f"{folder.name}-{'none' if weight is None else f'{weight:g}'}-{seed}"
                summary = trained(folder, out, weight, seed, given.steps)
                moved = float(np.abs(drawn(out, 1.0) - drawn(out, 0.0)).mean())
                print(
                    f"| {folder.name} | {weight or 'none'} | {seed} | {summary.base_validation_loss:.3f} "
                    f"| {summary.validation_loss:.3f} | {moved:.3f} |",
                    flush=True,
                )
                rows.append({"subject": folder.name, "prior": weight, "seed": seed, "moved": moved})
                rows[-1] |= {"before": summary.base_validation_loss, "after": summary.validation_loss}
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2))


def trained(folder: Path, out: Path, weight: float | None, seed: int, steps: int) -> RunSummary:
    """A run of the preset `quickstart` with DreamBooth's caption, whose last photographs are held out."""
    # The photographs' own captions would name the class alone.
    photographs = out.with_name(f"{out.name}-photographs")
    photographs.mkdir()
    for picture in sorted(folder.glob("*.jpg")):
        (photographs / picture.name).symlink_to(picture.resolve())
    subject = f"a photo of sks {folder.name}"
    keys = [f"data.path={photographs}", f"data.caption={subject}", "data.held_out=0.2", "train.lr=3e-3", f"seed={seed}"]
    keys += [f"sample.prompts=['{subject}', '{CLASS}']", f"sample.every={steps}", f"train.steps={steps}"]
    if weight is not None:
        keys += [
            f"prior.caption={CLASS}",
            f"prior.path={out.parent / 'class'}",
            "prior.images=32",
            f"prior.weight={weight}",
        ]
    return run(load_config("quickstart", keys), out, Silent())


def drawn(run: Path, weight: float) -> np.ndarray:
    """Pictures of the class, `(n, height, width, 3)` from 0 to 1, by the base with so much of a run's adapter."""
    out = run.with_name(f"{run.name}-class-{weight:g}")
    request = Request([run], [CLASS], [weight], images=PICTURES, size="64", steps=20, guidance=4.0, seed=1, out=out)
    return np.stack([np.asarray(Image.open(file), dtype=np.float64) / 255 for file in infer(request, Told()).images])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
