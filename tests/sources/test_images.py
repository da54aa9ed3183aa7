"""utils/data/images.py: every kind of file is read correctly, or refused by name."""

import io

import numpy as np
import pytest
from PIL import Image

from utils.data.pixels import BadImage, augment, prepare_image, to_eight_bits
from utils.pictures import make_grid
from utils.sources.decoding import decode_image

RAMP = np.linspace(0, 1, 64).reshape(8, 8)


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def load(image, mode, format="PNG", **options):
    return np.asarray(to_eight_bits(decode_image(encode(image, format, **options), "x"), mode, "x"))


@pytest.mark.parametrize(
    "image, format",
    [
        (Image.fromarray((RAMP * 65535).astype(np.uint16)), "PNG"),
        (Image.fromarray((RAMP * 65535).astype(np.uint16)), "TIFF"),
        (Image.fromarray((RAMP * 65535).astype(np.int32)), "TIFF"),
        (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        (Image.fromarray((RAMP * 255).astype(np.float32)), "TIFF"),
    ],
)
def test_wide_formats_are_scaled_by_their_range(image, format):
    for mode in ("L", "RGB"):
        pixels = load(image, mode, format)
        expected = RAMP * 255 if mode == "L" else np.repeat(RAMP[..., None] * 255, 3, axis=2)
        assert np.abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("values", [[np.nan, 0], [-1, 0], [0, 1e4], [0, np.inf]])
def test_float_images_without_a_known_range_are_refused(values):
    image = Image.fromarray(np.array([values], np.float32))
    with pytest.raises(BadImage, match=r"scan\.tif: values from .*Expected floats"):
        load_named = decode_image(encode(image, "TIFF"), "scan.tif")
        to_eight_bits(load_named, "L", "scan.tif")


def test_transparent_pixels_become_white_not_what_they_hide():
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (load(hidden, "RGB") == 255).all()
    half = Image.new("LA", (4, 4), (0, 128))
    assert np.abs(load(half, "L").astype(int) - 127).max() <= 1
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert load(palette, "RGB")[0, 0].tolist() == [200, 10, 10]
    assert (load(palette, "RGB", transparency=1) == 255).all()


def test_one_bit_cmyk_and_animated_images():
    assert set(np.unique(load(Image.fromarray(RAMP > 0.5), "L"))) == {0, 255}
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = load(cmyk, "RGB", "JPEG")[8, 8].astype(int)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    first = load(frames[0], "L", "GIF", save_all=True, append_images=frames[1:])
    assert np.abs(first.astype(int) - 10).max() <= 2


def test_exif_rotation_is_applied():
    image = Image.new("L", (60, 40))
    exif = image.getexif()
    exif[0x0112] = 6
    assert decode_image(encode(image, "JPEG", exif=exif), "x").size == (40, 60)


PNG = encode(Image.fromarray((RAMP * 255).astype(np.uint8)).resize((64, 64)))
JPEG = encode(Image.fromarray((RAMP * 255).astype(np.uint8)).resize((64, 64)), "JPEG")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", PNG[: len(PNG) // 2], JPEG[: len(JPEG) // 2]])
def test_damaged_files_are_named(content):
    with pytest.raises(BadImage, match=r"^holiday\.jpg: .*Expected a complete image file"):
        decode_image(content, "holiday.jpg")


def test_deleted_file_is_named(tmp_path):
    with pytest.raises(BadImage, match=r"gone\.png: .*No such file"):
        decode_image(str(tmp_path / "gone.png"), "gone.png")


def test_too_many_pixels_are_an_error_not_a_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for side in (40, 64):  # Pillow warns above the limit and raises above twice the limit
        with pytest.raises(BadImage, match=r"x: more than 0 megapixels"):
            decode_image(encode(Image.new("L", (side, side))), "x")


def test_mutated_files_never_raise_anything_but_a_named_error():
    rng, refused = np.random.default_rng(0), 0
    for k in range(300):
        content = np.frombuffer([PNG, JPEG][k % 2], np.uint8).copy()
        where = rng.integers(0, len(content), size=rng.integers(1, 12))
        content[where] = rng.integers(0, 256, size=len(where))
        try:
            image = to_eight_bits(
                decode_image(content.tobytes()[: rng.integers(1, len(content) + 1)], f"file{k}"), "L", "x"
            )
            assert image.mode == "L"
        except BadImage as error:
            refused += 1
            assert f"file{k}" in str(error)
    assert refused > 50


def test_resize_keeps_the_aspect_and_crops_the_middle():
    image = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8), (40, 1)))  # 80 wide, 40 high
    assert prepare_image(image, (20, 20), center_crop=False).shape == (1, 20, 40)
    middle = prepare_image(image, (20, 20), center_crop=True)
    assert middle.shape == (1, 20, 20)
    assert abs(middle.mean() - 39.5) < 1
    assert prepare_image(image.convert("RGB"), (40, 40), center_crop=True).shape == (3, 40, 40)
    assert prepare_image(Image.new("L", (1, 1)), (8, 8), center_crop=False).shape == (1, 8, 8)


def test_random_crop_and_flip_follow_the_sample_id():
    image = np.arange(4 * 12, dtype=np.uint8).reshape(1, 4, 12)
    crops = [augment(image, number, (4, 4), 3, True) for number in range(200)]
    assert all(crop.shape == (1, 4, 4) for crop in crops)
    assert all((crop == augment(image, number, (4, 4), 3, True)).all() for number, crop in enumerate(crops))
    lefts = {int(min(crop[0, 0, 0], crop[0, 0, -1])) for crop in crops}
    assert lefts == set(range(9))  # every offset occurs
    mirrored = sum(crop[0, 0, 0] > crop[0, 0, -1] for crop in crops)
    assert 70 < mirrored < 130


def test_grid_places_images_in_reading_order_with_gaps():
    images = np.stack([np.full((1, 32, 32), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    grid = np.asarray(make_grid(images, min_cell=32))
    assert grid.shape == (2 * 34 + 2, 3 * 34 + 2)
    assert [int(grid[18, 18 + 34 * k]) for k in range(3)] == [10, 20, 30]
    assert grid[52, 18] == 40 and grid[52, 86] == 96  # the empty place keeps the background
    assert make_grid(np.zeros((4, 3, 8, 8), np.uint8)).size == (2 * 68 + 4, 2 * 68 + 4)  # enlarged eight times
