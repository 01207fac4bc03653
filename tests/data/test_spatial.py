"""Masks and boxes move with their image: against the image, and against each other."""

import cv2
import numpy as np
import pytest
import simplejpeg
from png_files import png

from big_vision_lite.data import ops
from big_vision_lite.data.ops import resampling as crops
from big_vision_lite.data.ops.decode import UndecodableImage, decode_mask
from big_vision_lite.data.ops.randaugment import RandAugment
from big_vision_lite.data.ops.resampling import Resampling, Rounding

# Larger than what is cut out of it, and smaller than 256: an index is a pixel value.
HEIGHT, WIDTH = 90, 120
ONLY_CROPS = [
    ops.CentralCrop(size_px=61, width_px=44),
    ops.CentralCrop(size_px=61, rounding=Rounding.NEAREST),
    ops.RandomCrop(size_px=50, width_px=70),
    ops.RandomCrop(size_px=80, padding=13),
    ops.FlipLeftRight(),
]
RESIZING = [
    ops.InceptionCrop(size_px=48, width_px=65),
    ops.InceptionCrop(size_px=200, resampling=Resampling.BICUBIC),
    ops.DecodeInceptionCrop(size_px=48),
    ops.RandomResizedCrop(size_px=48, width_px=33, resampling=Resampling.ANTIALIAS),
    ops.Resize(size_px=45, width_px=60),
    ops.Resize(size_px=180, width_px=240),
    ops.Resize(size_px=37, width_px=233),
    ops.ResizeSmall(size_px=48),
    ops.ResizeSmall(size_px=32, width_px=50, resampling=Resampling.PIL_BICUBIC),
    ops.RandomAffine(degrees=40.0, translate=0.2, scale_min=0.7, shear_degrees=20.0),
]
ALL = ONLY_CROPS + RESIZING
# Also where half a pixel is exact: a side that stays, halves or doubles.
SEEDS = range(6)


def rng(seed=0):
    return np.random.default_rng(seed)


def names(op):
    return type(op).__name__


def ramps():
    """An image whose red is the column and whose green is the row of each pixel."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    return np.stack([columns, rows, np.full_like(rows, 255)], -1).astype(np.uint8)


def random_boxes(generator, count=9):
    corners = np.sort(generator.random((2, count, 2)), axis=0)
    return np.concatenate([corners[0], corners[1]], axis=1).astype(np.float32)


@pytest.mark.parametrize("op", ONLY_CROPS, ids=names)
def test_a_mask_equals_the_channel_it_was_cut_from(op):
    image = rng().integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    for seed in SEEDS:
        result = op({"image": image, "mask": image[..., 1].copy()}, rng(seed))
        np.testing.assert_array_equal(result["mask"], result["image"][..., 1])


@pytest.mark.parametrize("op", RESIZING, ids=names)
@pytest.mark.parametrize("channel", [0, 1])
def test_a_mask_holds_the_place_that_its_pixel_shows(op, channel):
    image = ramps()
    for seed in SEEDS:
        example = {"image": image, "mask": image[..., channel].copy()}
        result = op(example, rng(seed))
        shown, mask = result["image"].astype(int), result["mask"].astype(int)
        assert mask.shape == shown.shape[:2]
        # Blue is 255 inside; at the borders a filter sees less than its support.
        inside = cv2.erode((shown[..., 2] == 255).astype(np.uint8), np.ones((3, 3))) > 0
        inside[[0, 1, -1, -2]] = inside[:, [0, 1, -1, -2]] = False
        assert inside.any()
        # Half a pixel of the mask, half a value of the image, a bit for the filter.
        away = np.abs(shown[..., channel] - mask)[inside]
        assert away.max() <= 1.01 and (away == 0).mean() > 0.3


@pytest.mark.parametrize("op", ALL, ids=names)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_and_draws_are_the_same_with_and_without_other_keys(op, channels):
    image = rng().integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    if channels == 1 and not isinstance(op, ops.DecodeInceptionCrop):
        image = image[..., :1]
    for seed in SEEDS:
        one, other = rng(seed), rng(seed)
        alone = op({"image": image, "label": 3}, one)
        mask = image[..., 0].astype(np.int32)
        boxes = random_boxes(rng(seed))
        example = {
            "image": image,
            "label": 3,
            "mask": mask,
            "boxes": boxes,
            "text": "a",
        }
        kept = {key: np.copy(value) for key, value in example.items()}
        result = op(example, other)
        np.testing.assert_array_equal(result["image"], alone["image"])
        assert one.random() == other.random()
        assert result["label"] == 3 and result["text"] == "a"
        assert result["mask"].dtype == np.int32 and result["boxes"].dtype == np.float32
        for key, value in kept.items():  # Nothing is changed in place.
            np.testing.assert_array_equal(example[key], value)


@pytest.mark.parametrize("op", ALL, ids=names)
def test_a_box_is_the_bounding_box_of_its_rectangle_in_the_mask(op):
    if isinstance(op, ops.RandomAffine):
        # The bounding box of a rotated rectangle's pixels is that of its corners.
        op = ops.RandomAffine(degrees=30.0, translate=0.3, shear_degrees=15.0)
    image, seen, lost = ramps(), 0, 0
    for seed in range(30):
        rows = np.sort(rng(seed).choice(HEIGHT + 1, 2, replace=False))
        columns = np.sort(rng(seed + 99).choice(WIDTH + 1, 2, replace=False))
        mask = np.zeros((HEIGHT, WIDTH, 1), np.uint16)
        mask[rows[0] : rows[1], columns[0] : columns[1]] = 999
        edges = np.array([rows[0], columns[0], rows[1], columns[1]])
        boxes = np.zeros((2, 4), np.float32)
        boxes[0] = edges / [HEIGHT, WIDTH, HEIGHT, WIDTH]
        result = op({"image": image, "mask": mask, "boxes": boxes}, rng(seed))
        height, width = result["image"].shape[:2]
        assert result["mask"].shape == (height, width, 1)
        assert result["boxes"].shape == (2, 4) and not result["boxes"][1].any()
        found = np.argwhere(result["mask"][..., 0])
        box = result["boxes"][0] * [height, width, height, width]
        if not len(found):
            # Outside, or so thin a rest that no pixel's centre is in it.
            assert min(box[2] - box[0], box[3] - box[1]) <= 1.0 or is_corner(op, box)
            lost += not box.any()
            continue
        seen += 1
        expected = [*found.min(0), *(found.max(0) + 1)]
        if not is_affine(op):
            np.testing.assert_allclose(box, expected, atol=1.0 * scale(op))
        else:  # Clipped corners reach further than the pixels that are left.
            assert (box[:2] <= np.add(expected[:2], 1)).all()
            assert (box[2:] >= np.subtract(expected[2:], 1)).all()
    assert seen > 8


def is_affine(op):
    return isinstance(op, ops.RandomAffine)


def is_corner(op, box):
    return is_affine(op) and box.any()


def scale(op):
    # A pixel of the old image, where the new one is larger.
    return (
        4.0
        if max(op.__dict__.get("size", 0), op.__dict__.get("width") or 0) > 150
        else 1.0
    )


def test_corners_of_an_affine_that_stay_inside_bound_the_pixels_closely():
    op = ops.RandomAffine(
        degrees=60.0, translate=0.0, scale_max=1.0, shear_degrees=10.0
    )
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[35:55, 45:75] = 1
    boxes = np.array([[35 / 90, 45 / 120, 55 / 90, 75 / 120]], np.float32)
    for seed in SEEDS:
        result = op({"image": ramps(), "mask": mask, "boxes": boxes}, rng(seed))
        found = np.argwhere(result["mask"])
        box = result["boxes"][0] * [HEIGHT, WIDTH, HEIGHT, WIDTH]
        # A sharp corner may lie between the centres of pixels.
        np.testing.assert_allclose(box, [*found.min(0), *(found.max(0) + 1)], atol=1.5)


def test_boxes_by_hand():
    image = np.zeros((10, 20, 1), np.uint8)
    boxes = np.array([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 1.0, 0.25]], np.float32)
    cut = ops.CentralCrop(size_px=10)({"image": image, "boxes": boxes}, rng())["boxes"]
    # Columns 5 to 15 are left: the second box ended just there.
    np.testing.assert_allclose(cut, [[0.0, 0.0, 0.5, 0.5], [0, 0, 0, 0]])
    resized = ops.Resize(size_px=3)({"image": image, "boxes": boxes}, rng())["boxes"]
    np.testing.assert_allclose(resized, boxes, atol=1e-6)
    flip = ops.FlipLeftRight()
    flipped = next(
        out["boxes"]
        for out in (flip({"image": image, "boxes": boxes}, rng(s)) for s in range(9))
        if not np.array_equal(out["boxes"], boxes)
    )
    np.testing.assert_allclose(flipped, [[0.0, 0.5, 0.5, 1.0], [0.0, 0.75, 1.0, 1.0]])


def test_a_small_box_survives_in_a_thumbnail():
    image = np.zeros((2000, 2000, 3), np.uint8)
    box = np.array([[1000, 1000, 1001, 1001]], np.float32) / 2000
    example = {"image": image, "boxes": box}
    found = ops.Resize(size_px=16)(example, np.random.default_rng(0))["boxes"]
    np.testing.assert_allclose(found, box, atol=1e-6)
    # Beside the crop by a rounding is outside of it all the same.
    beside = {"image": image, "boxes": np.array([[0, 0, 0.25, 1]], np.float32)}
    lower = ops.CentralCrop(size_px=1000)(beside, np.random.default_rng(0))["boxes"]
    np.testing.assert_array_equal(lower, np.zeros((1, 4), np.float32))


def test_an_image_without_boxes_has_none_afterwards():
    none = np.zeros((0, 4), np.float32)
    for op in ALL:
        result = op({"image": ramps(), "boxes": none}, rng())["boxes"]
        assert result.shape == (0, 4) and result.dtype == np.float32


def test_what_comes_from_outside_is_zero_and_nothing_is_blended():
    mask = rng().choice(np.array([100, 200], np.uint8), (HEIGHT, WIDTH))
    op = ops.RandomAffine(degrees=30.0, translate=0.2)
    affine = op({"image": ramps(), "mask": mask}, rng())["mask"]
    assert set(np.unique(affine)) == {0, 100, 200}
    whole = ops.RandomCrop(size_px=HEIGHT + 8, width_px=WIDTH + 8, padding=4)
    padded = whole({"image": ramps(), "mask": mask}, rng())["mask"]
    np.testing.assert_array_equal(padded, np.pad(mask, 4))
    for op in RESIZING[:-1]:
        out = op({"image": ramps(), "mask": mask == 100}, rng())["mask"]
        assert out.dtype == bool


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("mask", np.zeros((4, 5), np.uint8), '"mask" has 4 x 5 pixels, its image 90 x'),
        ("mask", np.zeros((HEIGHT, WIDTH)), "must hold integers .*got float64"),
        ("mask", np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"got uint8 \[90, 120, 3\]"),
        ("mask", b"\x89PNG", r"got bytes; .*Decode\(\)"),
        ("boxes", np.zeros((2, 5), np.float32), r"float32 \[n, 4\] .*float32 \[2, 5\]"),
        ("boxes", np.zeros((2, 4), np.int64), "got int64"),
        ("boxes", [[0, 0, 1, 1]], "got list"),
        ("boxes", np.array([[0, 0, 44, 9.0]]), "values in 0..44; .*divide pixels"),
        ("boxes", np.array([[0, 0, np.nan, 1]]), "fractions of the image"),
    ],
)
def test_masks_and_boxes_of_another_form_are_refused(key, value, message):
    for op in (ops.Resize(size_px=9), ops.CentralCrop(size_px=9), ops.RandomAffine()):
        with pytest.raises(ValueError, match=message):
            op({"image": ramps(), key: value}, rng())


def test_randaugment_refuses_what_it_would_misalign():
    with pytest.raises(ValueError, match="would leave mask and boxes .*leave RandAugm"):
        RandAugment()({"image": ramps(), "mask": 1, "boxes": 2}, rng())
    assert RandAugment()({"image": ramps(), "label": 1}, rng())["label"] == 1


@pytest.mark.parametrize("op", [ops.ToGray(), ops.Invert(), ops.ToRgb()], ids=names)
def test_colour_ops_touch_the_image_only(op):
    mask, boxes = ramps()[..., 0], random_boxes(rng())
    result = op({"image": ramps(), "mask": mask, "boxes": boxes}, rng())
    assert result["mask"] is mask and result["boxes"] is boxes


# Files of masks.


def encoded(extension, pixels):
    return cv2.imencode(extension, pixels)[1].tobytes()


@pytest.mark.parametrize("dtype, high", [(np.uint8, 256), (np.uint16, 2**16)])
def test_a_png_gives_the_integers_that_were_written(dtype, high):
    mask = rng().integers(0, high, (HEIGHT, WIDTH)).astype(dtype)
    decoded = decode_mask(encoded(".png", mask))
    np.testing.assert_array_equal(decoded, mask)
    assert decoded.dtype == dtype and decoded.shape == (HEIGHT, WIDTH)
    photo = simplejpeg.encode_jpeg(ramps())
    example = {"image": photo, "mask": encoded(".png", mask)}
    both = ops.Decode()(example, rng())
    np.testing.assert_array_equal(both["mask"], mask)
    # In one step, or in two.
    one = ops.DecodeInceptionCrop(size_px=16)(example, rng(4))
    two = ops.InceptionCrop(size_px=16)(both, rng(4))
    np.testing.assert_array_equal(one["mask"], two["mask"])
    np.testing.assert_array_equal(one["image"], two["image"])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [0, 3], ids=["gray", "palette"])
def test_few_bits_and_palettes_give_the_stored_indices(bits, kind):
    indices = np.arange(24) % 2**bits
    packed = np.unpackbits(indices.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    row = b"\0" + np.packbits(packed.ravel()).tobytes()
    colours = rng().integers(0, 256, 3 * 2**bits).astype(np.uint8).tobytes()
    palette = ((b"PLTE", colours), (b"tRNS", b"\0\7")) if kind == 3 else ()
    mask = decode_mask(png(24, 1, bits, kind, row, *palette))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, indices[None])


def test_a_palette_mask_as_pillow_writes_it():
    image = pytest.importorskip("PIL.Image")
    import io

    mask = rng().integers(0, 21, (30, 40)).astype(np.uint8)
    written = image.fromarray(mask)
    written.putpalette(rng().integers(0, 256, 768).astype(np.uint8).tobytes())
    file = io.BytesIO()
    written.save(file, "PNG")
    assert image.open(io.BytesIO(file.getvalue())).mode == "P"
    np.testing.assert_array_equal(decode_mask(file.getvalue()), mask)


PNG = encoded(".png", rng().integers(0, 9, (60, 80)).astype(np.uint8))


@pytest.mark.parametrize("data", [b"", PNG[:20], PNG[:200], PNG[:-60]])
def test_damaged_masks_are_unreadable(data):
    with pytest.raises(UndecodableImage, match="mask"):
        decode_mask(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (simplejpeg.encode_jpeg(ramps()), "no PNG: other formats change"),
        (encoded(".png", ramps()), "PNG of several channels"),
        (png(1, 1, 8, 4, b"\0\1\2"), "with transparency"),
    ],
)
def test_masks_in_colours_or_lossy_files_are_a_mistake_of_the_source(data, message):
    with pytest.raises(ValueError, match=message) as refused:
        decode_mask(data)
    assert not isinstance(refused.value, UndecodableImage)


def test_a_mask_of_another_size_is_refused_when_it_is_decoded():
    example = {"image": ramps(), "mask": PNG}
    with pytest.raises(ValueError, match="60 x 80 pixels, its image 90 x 120"):
        ops.Decode()(example, rng())
    with pytest.raises(ValueError, match='needs the key "image"'):
        ops.Decode()({"mask": PNG}, rng())


def test_a_whole_window_is_nearest_at_half_pixel_centres():
    mask = np.arange(12, dtype=np.int64).reshape(3, 4)
    image = np.zeros((3, 4, 1), np.uint8)
    double = ops.Resize(size_px=6, width_px=8)({"image": image, "mask": mask}, rng())
    np.testing.assert_array_equal(double["mask"], mask.repeat(2, 0).repeat(2, 1))
    third = ops.Resize(size_px=1, width_px=4)({"image": image, "mask": mask}, rng())
    np.testing.assert_array_equal(third["mask"], mask[1:2])
    assert crops.resize(image, 6, 8, Resampling.BILINEAR).shape == (6, 8, 1)
