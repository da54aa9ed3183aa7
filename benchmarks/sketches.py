"""Write the embedded faces as pencil drawings, a style that a model of faces can be adapted to.

    python benchmarks/sketches.py outputs/sketches

This makes a folder for --train_data_dir, with 30 drawings in train/ and drawings of the 70 other faces in test/.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

sys.path.insert(0, str(Path(__file__).parent.parent))

TRAINED_ON = 30
SIDE = 64  # pixels; larger than the photographs, because lines are thin


def sketch(image: Image.Image) -> Image.Image:
    """Return an image as a grey pencil drawing: white in even areas, dark at edges and in shadows."""
    grey = ImageOps.autocontrast(image.convert("L"))
    blurred = ImageOps.invert(grey).filter(ImageFilter.GaussianBlur(grey.width / 10))
    paper = np.asarray(grey, np.float64) * 255 / np.maximum(255 - np.asarray(blurred, np.float64), 1)
    return Image.fromarray(paper.clip(0, 255).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path)
    folder = parser.parse_args().output_dir
    from utils.data.own_images import embedded_faces

    faces = embedded_faces()
    for k in range(len(faces)):
        image, _ = faces[k]["image"]()
        place = folder / ("train" if k < TRAINED_ON else "test")
        place.mkdir(parents=True, exist_ok=True)
        sketch(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).save(place / f"{k:03}.png")


if __name__ == "__main__":
    main()
