"""Decoding, crops and the small host ops: hand-made answers, numpy references."""

import pickle
import struct
import subprocess
import sys

import cv2
import numpy as np
import PIL.Image
import pytest
import simplejpeg
from png_files import png

from big_vision_lite.data import MAX_PIXELS, ops, undecodable
from big_vision_lite.data.ops import resampling as crops
from big_vision_lite.data.ops.decode import UndecodableImage, decode
from big_vision_lite.data.ops.resampling import Box, Resampling, Rounding

FOUR = np.arange(0, 160, 10, dtype=np.uint8).reshape(4, 4, 1)


def rng(seed=0):
    return np.random.default_rng(seed)


def apply(op, image, seed=0):
    return op({"image": image, "label": 3}, rng(seed))["image"]


def photo(height, width, seed=0):
    """Smooth colours with some noise: what JPEG is made for."""
    coarse = rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = rng(seed).integers(0, 12, (height, width, 3), dtype=np.uint8)
    return cv2.add(smooth, noise)


def encoded(extension, image, *options):
    ok, data = cv2.imencode(extension, image, list(options))
    assert ok
    return data.tobytes()


# Decoding


@pytest.mark.parametrize("extension", [".png", ".bmp", ".webp"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_lossless_files_decode_to_the_pixels_that_were_written(extension, kind):
    image = photo(5, 7)
    options = (cv2.IMWRITE_WEBP_QUALITY, 101) if extension == ".webp" else ()
    data = kind(encoded(extension, image[..., ::-1], *options))
    np.testing.assert_array_equal(decode(data), image)
    gray = decode(data, channels=1)
    assert gray.shape == (5, 7, 1)
    expected = image @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(gray[..., 0], expected, atol=0.51)


def test_jpeg_decodes_in_rgb_order_and_gray():
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 200
    data = simplejpeg.encode_jpeg(image, quality=98)
    np.testing.assert_allclose(decode(data), image, atol=3)
    np.testing.assert_allclose(decode(data, channels=1), 0.299 * 200, atol=2)
    one = np.full((16, 16, 1), 200, np.uint8)
    gray = simplejpeg.encode_jpeg(one, colorspace="GRAY", quality=98)
    np.testing.assert_allclose(decode(gray), 200, atol=3)
    assert decode(gray).shape == (16, 16, 3)


def test_cmyk_jpeg_becomes_rgb():
    # Inverted, as Adobe and therefore everybody writes it: 255 is no ink.
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[...] = (255, 127, 0, 255)
    data = simplejpeg.encode_jpeg(ink, colorspace="CMYK", quality=98)
    np.testing.assert_allclose(decode(data)[0, 0], (255, 127, 0), atol=3)
    assert decode(data, channels=1).shape == (16, 16, 1)


def test_palette_png_becomes_rgb():
    palette = bytes([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    data = png(4, 1, 8, 3, b"\0\0\1\2\3", (b"PLTE", palette))
    expected = [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]]
    np.testing.assert_array_equal(decode(data), expected)


def test_sixteen_bit_samples_keep_their_high_byte():
    values = np.array([[0, 255, 256, 65535]], np.uint16)
    gray = encoded(".png", values)
    np.testing.assert_array_equal(decode(gray, channels=1)[0, :, 0], [0, 0, 1, 255])
    color = encoded(".png", np.stack([values, values // 2, values * 0], -1))
    np.testing.assert_array_equal(decode(color)[0, 3], [0, 127, 255])


@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_is_composited_on_white(channels):
    bgra = np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [0, 0, 0, 51]]], np.uint8)
    decoded = decode(encoded(".png", bgra), channels)
    expected = np.broadcast_to(np.array([255, 0, 204])[None, :, None], decoded.shape)
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(decode(bgra, channels), expected)


def test_opaque_alpha_changes_nothing():
    image = photo(4, 5)
    opaque = np.dstack([image, np.full((4, 5), 255, np.uint8)])
    np.testing.assert_array_equal(decode(opaque), image)
    # Rounding of the mix, against exact arithmetic.
    alpha = rng().integers(0, 256, (4, 5, 1))
    mixed = np.rint((image * alpha + 255 * (255 - alpha)) / 255)
    part = np.dstack([image, alpha.astype(np.uint8)])
    np.testing.assert_array_equal(decode(part), mixed)


@pytest.mark.parametrize("extension", [".webp", ".gif"])
def test_animation_gives_its_first_frame(extension):
    animation = cv2.Animation()
    colors = ((0, 0, 255), (0, 255, 0))
    frames = [np.full((8, 8, 3), color, np.uint8) for color in colors]
    animation.frames = frames
    animation.durations = np.array([100, 100], np.int32)
    ok, data = cv2.imencodeanimation(extension, animation)
    assert ok
    np.testing.assert_allclose(decode(data.tobytes())[4, 4], (255, 0, 0), atol=12)


def test_exif_rotation_is_ignored():
    data = simplejpeg.encode_jpeg(photo(8, 16))
    tiff = b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    body = b"Exif\0\0" + tiff
    turned = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    as_array = np.frombuffer(turned, np.uint8)
    assert cv2.imdecode(as_array, cv2.IMREAD_COLOR).shape == (16, 8, 3)
    np.testing.assert_array_equal(decode(turned), decode(data))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4), (1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_arrays_pass_through(shape, channels):
    image = rng().integers(0, 256, shape, dtype=np.uint8)
    decoded = apply(ops.Decode(channels=channels), image)
    assert decoded.shape == (*shape[:2], channels)
    assert decoded.dtype == np.uint8
    if shape[2:] != (4,) and (shape[2:] or (1,)) == (channels,):
        np.testing.assert_array_equal(decoded.reshape(shape), image)


@pytest.mark.parametrize("channels", [2, 4, 13])
def test_images_of_other_channels_come_as_arrays_and_stay_as_they_are(channels):
    image = rng().integers(0, 256, (4, 5, channels), dtype=np.uint8)
    np.testing.assert_array_equal(apply(ops.Decode(channels=channels), image), image)
    files = (JPEG, b"no image at all")
    arrays = (image[..., :1], image[..., 0], image[:0], np.float32(image))
    for wrong, message in [
        *((file, f"1 .gray. or 3 channels .RGB., not {channels}") for file in files),
        *((array, r"got (\[|float32)") for array in arrays),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            apply(ops.Decode(channels=channels), wrong)
        assert not isinstance(
            caught.value, UndecodableImage
        )  # never skipped in silence


# Unreadable and wrong input


JPEG = simplejpeg.encode_jpeg(photo(60, 80), quality=90)
SCREEN = struct.pack("<HH", 30_000, 30_000)
GIF = b"GIF89a%s\x80%s,%s%s\0\2\2D\1\0;" % (SCREEN, bytes(8), bytes(4), SCREEN)
BMP = struct.pack("<IHHI", 154, 0, 0, 54) + struct.pack(
    "<IiiHH", 40, 30_000, -30_000, 1, 24
)
WEBP = (
    b"RIFF\x64\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0"
    + (29_999).to_bytes(3, "little")
    + (29_999).to_bytes(3, "little")
    + bytes(9)
)


def big_jpeg():
    frame = JPEG.index(b"\xff\xc0")
    sides = struct.pack(">HH", 30_000, 30_000)
    return JPEG[: frame + 5] + sides + JPEG[frame + 9 :]


TOO_LARGE = "has more than 200,000,000 pixels, the limit; store it smaller"
UNREADABLE = {
    "empty": (b"", "0 bytes"),
    "text": (
        b"this is no image at all",
        "not a JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF",
    ),
    "one byte": (b"\xff", "not a JPEG"),
    "TIFF": (b"II*\0" + bytes(40), "TIFF is damaged"),
    "JPEG magic only": (b"\xff\xd8\xff", "header"),
    "JPEG cut in the header": (JPEG[:100], "header"),
    "JPEG cut at a half": (JPEG[: len(JPEG) // 2], "cut short"),
    "JPEG cut by 1 byte": (JPEG[:-1], "cut short"),
    "JPEG cut by 3 bytes": (JPEG[:-3], "cut short"),
    "PNG cut at a half": (encoded(".png", photo(60, 80))[:4000], "PNG is damaged"),
    "PNG magic only": (b"\x89PNG\r\n\x1a\n", "PNG is damaged"),
    "WebP cut at a half": (encoded(".webp", photo(60, 80))[:800], "WebP is damaged"),
    "BMP cut at a half": (encoded(".bmp", photo(60, 80))[:4000], "BMP is damaged"),
    "JPEG of 30,000 px": (big_jpeg(), "30000 x 30000 = 900,000,000 pixels"),
    "PNG of 30,000 px": (png(30_000, 30_000, 8, 2, b""), "900,000,000 pixels"),
    "GIF of 30,000 px": (GIF, "30000 x 30000 = 900,000,000 pixels"),
    "WebP of 30,000 px": (WEBP, TOO_LARGE),
    "BMP of 30,000 px": (b"BM" + BMP + bytes(124), "900,000,000 pixels"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_bytes_are_refused_with_the_reason(name):
    data, reason = UNREADABLE[name]
    with pytest.raises(UndecodableImage, match=reason) as caught:
        ops.Decode()({"image": data, "label": 0}, rng())
    assert caught.value.reason == str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


def test_a_jpeg_cut_at_any_byte_is_refused():
    for length in range(0, len(JPEG), 37):
        with pytest.raises(UndecodableImage):
            decode(JPEG[:length])


def test_a_png_with_one_flipped_byte_is_refused():
    data = bytearray(encoded(".png", photo(60, 80)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UndecodableImage, match="PNG is damaged"):
        decode(bytes(data))


def test_padding_around_the_end_of_a_jpeg_is_no_damage():
    image = decode(JPEG)
    np.testing.assert_array_equal(decode(JPEG + bytes(50)), image)
    np.testing.assert_array_equal(decode(JPEG[:-2] + bytes(50) + JPEG[-2:]), image)


def test_long_thin_images_below_the_limit_decode():
    line = png(30_000, 1, 8, 0, bytes(30_001))
    assert decode(line).shape == (1, 30_000, 3)
    assert apply(ops.DecodeInceptionCrop(size_px=8), line).shape == (8, 8, 3)
    assert apply(ops.Resize(size_px=8, width_px=4), decode(line)).shape == (8, 4, 3)
    with pytest.raises(UndecodableImage, match="resized"):
        apply(ops.ResizeSmall(size_px=256), decode(line))
    assert MAX_PIXELS > 12_000 * 9_000  # a camera of 100 megapixels


def test_the_limit_holds_where_opencv_was_imported_first(monkeypatch):
    monkeypatch.setattr(undecodable, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(UndecodableImage, match="PNG has 60 x 80 = 4,800 pixels"):
        decode(encoded(".png", photo(60, 80)))


@pytest.mark.parametrize(
    "image, message",
    [
        (np.full((2, 2, 3), np.nan), "12 NaN and 0 infinite"),
        (np.array([[0.0, np.inf]]), "0 NaN and 1 infinite"),
        (np.array([[0.0, 300.0]]), "float64 in 0..300"),
        (np.array([[-4, 3]], np.int32), "int32 in -4..3"),
        (np.array([[0.0, 1.0]], np.float32), "np.rint"),
        (np.zeros((4, 4), bool), "got bool"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), "at least one pixel"),
        (np.zeros((4,), np.uint8), r"\[4\]"),
    ],
)
def test_arrays_that_are_no_uint8_image_are_a_mistake_of_the_source(image, message):
    with pytest.raises(ValueError, match=message) as caught:
        apply(ops.Decode(), image)
    assert not isinstance(caught.value, UndecodableImage)  # never skipped in silence


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ops.Decode(channels=0), "channels=0: use 1 .gray., 3 .RGB., or as"),
        (lambda: ops.DecodeInceptionCrop(size_px=8, channels=-1), "channels=-1"),
        (lambda: ops.InceptionCrop(size_px=0), "size_px=0"),
        (lambda: ops.Resize(size_px=8, width_px=-1), "width_px=-1"),
        (lambda: ops.ResizeSmall(size_px=-3), "size_px=-3"),
        (
            lambda: ops.ResizeSmall(size_px=8, width_px=9, rounding=Rounding.DOWN),
            "rounding=down.*width_px both sides are rounded to the nearest",
        ),
        (lambda: ops.InceptionCrop(size_px=8, area_min=0.0), "area_min"),
        (
            lambda: ops.RandomResizedCrop(size_px=8, area_min=0.5, area_max=0.2),
            "area_max",
        ),
        (lambda: ops.InceptionCrop(size_px=8, area_max=100.0), "fractions"),
        (lambda: ops.RandomCrop(size_px=8, padding=-1), "padding=-1"),
        (lambda: ops.RandomAffine(scale_min=0.0), "scale"),
        (lambda: ops.RandomAffine(degrees=-1.0), "degrees=-1"),
        (lambda: ops.RandomAffine(shear_degrees=90.0), "shear_degrees=90"),
        (lambda: ops.RandomAffine(fill=256), "fill=256"),
    ],
)
def test_impossible_fields_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_crop_that_does_not_fit_says_what_to_put_before_it():
    for op in (ops.CentralCrop(size_px=5), ops.RandomCrop(size_px=3, width_px=5)):
        with pytest.raises(ValueError, match="4 x 4: put ResizeSmall"):
            apply(op, FOUR)


def test_an_undecoded_image_says_that_decode_is_missing():
    for image in (JPEG, np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(ValueError, match=r"FlipLeftRight .* put Decode\(\)"):
            apply(ops.FlipLeftRight(), image)
    with pytest.raises(ValueError, match='needs the key "image"'):
        ops.Invert()({"label": 1}, rng())


# Resizing


def bilinear(image, height, width):
    """Half-pixel centres, two taps a side, borders repeated; float64."""

    def taps(new, old):
        at = (np.arange(new) + 0.5) * old / new - 0.5
        low = np.floor(at).astype(int)
        weights = np.zeros((new, old))
        for k in range(new):
            weights[k, np.clip(low[k], 0, old - 1)] += 1 - (at[k] - low[k])
            weights[k, np.clip(low[k] + 1, 0, old - 1)] += at[k] - low[k]
        return weights

    rows, columns = taps(height, image.shape[0]), taps(width, image.shape[1])
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))


def covered(image, height, width):
    """The mean over the area that each new pixel covers; float64."""

    def shares(new, old):
        edges = np.arange(new + 1) * old / new
        low, high = edges[:-1, None], edges[1:, None]
        old_low = np.arange(old)[None]
        overlap = np.minimum(high, old_low + 1) - np.maximum(low, old_low)
        return np.clip(overlap, 0, None) * new / old

    rows, columns = shares(height, image.shape[0]), shares(width, image.shape[1])
    return np.einsum("yh,xw,hwc->yxc", rows, columns, image.astype(float))


SIZES = [(20, 30, 8, 8), (20, 30, 41, 64), (20, 30, 41, 7), (9, 9, 3, 3), (1, 1, 3, 5)]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("old_height, old_width, height, width", SIZES)
def test_bilinear_takes_two_taps_and_no_antialias(
    old_height, old_width, height, width, channels
):
    image = rng().integers(0, 256, (old_height, old_width, channels), dtype=np.uint8)
    ours = crops.resize(image, height, width, Resampling.BILINEAR)
    exact = bilinear(image, height, width)
    assert ours.shape == exact.shape and ours.dtype == np.uint8
    # Rounded (0.5) after fixed-point products that are cut off (0.25).
    np.testing.assert_allclose(ours, exact, atol=0.8)
    assert -0.2 < (ours - exact).mean() < 0.1  # truncation would give -0.5


@pytest.mark.parametrize("old_height, old_width, height, width", SIZES)
def test_area_averages_over_what_a_pixel_covers(old_height, old_width, height, width):
    image = rng().integers(0, 256, (old_height, old_width, 3), dtype=np.uint8)
    ours = crops.resize(image, height, width, Resampling.AREA)
    # Up to two roundings: a side that grows is a second pass.
    np.testing.assert_allclose(ours, covered(image, height, width), atol=1.3)


def test_antialias_averages_where_a_side_shrinks_and_is_smooth_where_it_grows():
    image = rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    shrunk = crops.resize(image, 7, 9, Resampling.ANTIALIAS)
    np.testing.assert_allclose(shrunk, covered(image, 7, 9), atol=0.6)
    grown = crops.resize(image, 33, 44, Resampling.ANTIALIAS)
    np.testing.assert_allclose(grown, bilinear(image, 33, 44), atol=0.8)
    mixed = crops.resize(image, 33, 9, Resampling.ANTIALIAS)
    exact = bilinear(covered(image, 20, 9), 33, 9)
    np.testing.assert_allclose(mixed, exact, atol=1.4)


@pytest.mark.parametrize(
    "op, antialiased",
    [
        (ops.Resize(size_px=4), False),
        (ops.InceptionCrop(size_px=4, area_min=1.0), False),
        (ops.DecodeInceptionCrop(size_px=4, area_min=1.0), False),
        (ops.RandomResizedCrop(size_px=4, area_min=1.0), False),
        (ops.ResizeSmall(size_px=4), True),
    ],
    ids=lambda value: "" if isinstance(value, bool) else type(value).__name__,
)
def test_ops_resize_as_big_vision_does_unless_told_otherwise(op, antialiased):
    # White, black, black, white: two taps see the black ones, an average sees all.
    stripes = np.tile([255, 0, 0, 255], 4)
    image = np.tile(stripes[:, None], (16, 1, 3)).astype(np.uint8)
    expected = np.full((4, 4, 3), 255 / 2 if antialiased else 0)
    np.testing.assert_allclose(apply(op, image), expected, atol=0.5)
    named = Resampling.AREA if antialiased else Resampling.BILINEAR
    np.testing.assert_array_equal(apply(op, image), crops.resize(image, 4, 4, named))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pillow_resizes_every_channel_alike(channels):
    image = rng().integers(0, 256, (40, 31, channels), np.uint8)
    ours = crops.resize(image, 17, 50, Resampling.PIL_BICUBIC)
    for channel in range(channels):
        plane = PIL.Image.fromarray(image[..., channel])
        theirs = plane.resize((50, 17), PIL.Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(ours[..., channel], theirs)
    ours[0] = 0  # an op may write into it


def test_resizing_by_hand():
    double = apply(ops.Resize(size_px=8), FOUR)[0, :, 0]
    exact = [0, 2.5, 7.5, 12.5, 17.5, 22.5, 27.5, 30]
    np.testing.assert_allclose(double, exact, atol=0.5)
    half = apply(ops.Resize(size_px=2), FOUR)[..., 0]
    np.testing.assert_array_equal(half, [[25, 45], [105, 125]])
    wide = apply(ops.Resize(size_px=2, width_px=4, resampling=Resampling.AREA), FOUR)[
        ..., 0
    ]
    np.testing.assert_array_equal(wide, [[20, 30, 40, 50], [100, 110, 120, 130]])
    flat = np.full((4, 4, 3), 77, np.uint8)
    for resampling in Resampling:
        out = apply(ops.Resize(size_px=9, width_px=3, resampling=resampling), flat)
        np.testing.assert_array_equal(out, np.full((9, 3, 3), 77))


def test_resize_small_keeps_the_aspect_and_rounds_both_sides():
    for shape, expected in (
        ((375, 500), (256, 341)),
        ((500, 375), (341, 256)),
        ((100, 100), (256, 256)),
        ((1, 1), (256, 256)),
        ((300, 401), (256, 342)),
    ):
        image = np.zeros((*shape, 3), np.uint8)
        assert apply(ops.ResizeSmall(size_px=256), image).shape == (*expected, 3)


# Crops


def test_central_crop_takes_floor_offsets():
    np.testing.assert_array_equal(
        apply(ops.CentralCrop(size_px=2), FOUR)[..., 0], [[50, 60], [90, 100]]
    )
    np.testing.assert_array_equal(
        apply(ops.CentralCrop(size_px=1), FOUR)[..., 0], [[50]]
    )  # (4 - 1) // 2 = 1
    np.testing.assert_array_equal(
        apply(ops.CentralCrop(size_px=4, width_px=3), FOUR)[:, 0, 0], [0, 40, 80, 120]
    )


def test_random_crop_reaches_every_offset_and_pads_with_zeros():
    seen = {
        apply(ops.RandomCrop(size_px=2), FOUR, seed)[0, 0, 0].item()
        for seed in range(200)
    }
    assert seen == {0, 10, 20, 40, 50, 60, 80, 90, 100}
    padded = np.pad(FOUR, ((1, 1), (1, 1), (0, 0)))
    windows = {
        padded[top : top + 4, left : left + 4].tobytes()
        for top in range(3)
        for left in range(3)
    }
    op = ops.RandomCrop(size_px=4, padding=1)
    assert {apply(op, FOUR, seed).tobytes() for seed in range(100)} == windows


AREA_QUANTILES = {
    # Of the areas in 20,000 (other shapes: 8,000) draws of TensorFlow 2.21.
    (224, 224): [0.087, 0.159, 0.329, 0.561, 0.733],
    (375, 500): [0.084, 0.150, 0.300, 0.504, 0.665],
    (500, 200): [0.070, 0.106, 0.179, 0.273, 0.350],
}


@pytest.mark.parametrize("shape", AREA_QUANTILES)
def test_inception_crop_has_the_area_quantiles_of_tensorflow(shape):
    generator = rng()
    boxes = np.array(
        [crops.inception_box((*shape, 3), 0.05, 1.0, generator) for _ in range(10_000)]
    )
    top, left, height, width = boxes.T
    area = height * width / np.prod(shape)
    quantiles = np.quantile(area, [0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(quantiles, AREA_QUANTILES[shape], atol=0.015)
    assert 0.05 <= area.min() and area.max() <= 1
    # Aspect uniform in [0.75, 1.33], but for the rounding of small sides.
    aspect = np.quantile(width / height, [0.1, 0.5, 0.9])
    np.testing.assert_allclose(aspect, [0.808, 1.04, 1.272], atol=0.02)
    assert top.min() == 0 and left.min() == 0
    assert (top + height).max() == shape[0] and (left + width).max() == shape[1]


def test_inception_crop_of_impossible_shapes_is_the_whole_image():
    for shape in ((10, 300, 3), (300, 10, 3), (1, 40, 1)):
        box = crops.inception_box(shape, 0.5, 1.0, rng())
        assert box == Box(0, 0, *shape[:2])
    assert crops.inception_box((1, 1, 3), 0.05, 1.0, rng()) == Box(0, 0, 1, 1)


def test_torchvision_crop_has_uniform_area_and_log_uniform_aspect():
    generator = rng()
    boxes = np.array(
        [
            crops.random_resized_box((900, 900, 3), 0.08, 0.5, generator)
            for _ in range(10_000)
        ]
    )
    # Every area up to 0.75 fits with every legal aspect: no draw was rejected.
    at = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    area = boxes[:, 2] * boxes[:, 3] / 900**2
    np.testing.assert_allclose(np.quantile(area, at), 0.08 + 0.42 * at, atol=0.01)
    aspect = np.log(boxes[:, 3] / boxes[:, 2])
    expected = np.log(3 / 4) + np.log(16 / 9) * at
    np.testing.assert_allclose(np.quantile(aspect, at), expected, atol=0.015)


def test_torchvision_crop_falls_back_to_the_centre_of_legal_aspect():
    assert crops.random_resized_box((10, 300, 3), 0.9, 1.0, rng()) == (0, 143, 10, 13)
    assert crops.random_resized_box((300, 10, 3), 0.9, 1.0, rng()) == (143, 0, 13, 10)
    assert crops.random_resized_box((1, 1, 3), 0.08, 1.0, rng()) == (0, 0, 1, 1)


def test_decode_inception_crop_equals_decode_then_inception_crop():
    for seed in range(5):
        one = apply(ops.DecodeInceptionCrop(size_px=16, width_px=24), JPEG, seed)
        both = apply(ops.InceptionCrop(size_px=16, width_px=24), decode(JPEG), seed)
        np.testing.assert_array_equal(one, both)
        assert one.shape == (16, 24, 3)


@pytest.mark.parametrize("kind", [ops.InceptionCrop, ops.RandomResizedCrop])
def test_a_crop_of_the_whole_area_keeps_a_square_image(kind):
    # Only aspect 1 fits: 100 or 10 tries, then the whole image.
    op = kind(size_px=4, area_min=1.0, area_max=1.0)
    np.testing.assert_array_equal(apply(op, FOUR), FOUR)


# Small ops


def test_flip_mirrors_half_of_the_images():
    outputs = [apply(ops.FlipLeftRight(), FOUR, seed) for seed in range(400)]
    mirrored = [np.array_equal(out, FOUR[:, ::-1]) for out in outputs]
    assert all(
        flipped or np.array_equal(out, FOUR)
        for flipped, out in zip(mirrored, outputs, strict=True)
    )
    assert 160 < sum(mirrored) < 240  # 4 standard deviations of a fair coin


IDENTITY = dict(degrees=0.0, scale=1.0, shear_degrees=0.0, right_px=0.0, down_px=0.0)


def test_affine_by_hand():
    def moved(**change):
        matrix = crops.affine_matrix(FOUR.shape, **{**IDENTITY, **change})
        return crops.warp(FOUR, matrix, fill=7)[..., 0]

    image = FOUR[..., 0]
    np.testing.assert_array_equal(moved(), image)
    right = np.full((4, 4), 7)
    right[:, 1:] = image[:, :3]
    np.testing.assert_array_equal(moved(right_px=1.0), right)
    down = np.full((4, 4), 7)
    down[2:] = image[:2]
    np.testing.assert_array_equal(moved(down_px=2.0), down)
    np.testing.assert_array_equal(moved(degrees=90.0), np.rot90(image))
    np.testing.assert_array_equal(moved(degrees=180.0), image[::-1, ::-1])
    doubled = moved(scale=2.0)[1:3, 1:3]
    np.testing.assert_allclose(doubled, [[62.5, 67.5], [82.5, 87.5]], atol=0.5)
    # 45 degrees move a row sideways by its distance from the centre, here half a pixel.
    sheared = moved(shear_degrees=45.0)[1:3]
    exact = [[45, 55, 65, 38.5], [43.5, 85, 95, 105]]
    np.testing.assert_allclose(sheared, exact, atol=0.5)


def test_random_affine_stays_within_its_ranges():
    image = np.zeros((41, 41, 1), np.uint8)
    image[20, 20] = 255
    op = ops.RandomAffine(degrees=0.0, translate=0.1, scale_min=1.0, scale_max=1.0)
    spots = []
    for seed in range(200):
        out = apply(op, image, seed).astype(float)[..., 0]
        rows, columns = np.indices(out.shape)
        spots.append([(rows * out).sum(), (columns * out).sum()] / out.sum() - 20)
    spots = np.array(spots)
    assert np.abs(spots).max() <= 4.1 + 0.1  # a tenth of 41 px; weights of 8 bits
    assert (np.abs(spots).max(0) > 3.7).all() and (np.abs(spots.mean(0)) < 0.7).all()


def test_random_affine_without_range_changes_nothing():
    op = ops.RandomAffine(degrees=0.0, translate=0.0, scale_min=1.0, scale_max=1.0)
    for image in (FOUR, photo(5, 7), np.full((1, 1, 3), 9, np.uint8)):
        np.testing.assert_array_equal(apply(op, image), image)


def test_channel_ops_by_hand():
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 100
    np.testing.assert_array_equal(
        apply(ops.ToGray(), red), np.full((4, 4, 1), 30)
    )  # 29.9
    np.testing.assert_array_equal(apply(ops.ToGray(), FOUR), FOUR)
    np.testing.assert_array_equal(apply(ops.ToRgb(), FOUR), FOUR.repeat(3, -1))
    np.testing.assert_array_equal(apply(ops.ToRgb(), red), red)
    np.testing.assert_array_equal(apply(ops.Invert(), FOUR), 255 - FOUR)


def test_keep_drops_other_keys_and_names_missing_ones():
    example = {"image": FOUR, "label": 1, "file": "a.png"}
    assert set(ops.Keep(keys=("image", "label"))(example, rng())) == {"image", "label"}
    with pytest.raises(ValueError, match="mask"):
        ops.Keep(keys=("image", "mask"))(example, rng())


# All ops

IMAGE_OPS = [
    ops.InceptionCrop(size_px=6, width_px=5),
    ops.RandomResizedCrop(size_px=6),
    ops.Resize(size_px=6),
    ops.ResizeSmall(size_px=6),
    ops.RandomCrop(size_px=2, padding=2),
    ops.FlipLeftRight(),
    ops.RandomAffine(shear_degrees=10.0),
    ops.ToGray(),
    ops.ToRgb(),
    ops.Invert(),
    ops.CentralCrop(size_px=1),
    ops.Decode(channels=3),
    ops.DecodeInceptionCrop(size_px=6, channels=1),
]


@pytest.mark.parametrize("op", IMAGE_OPS, ids=lambda op: type(op).__name__)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (1, 9, 3), (7, 2, 1)])
def test_ops_keep_type_channels_label_and_their_input(op, shape):
    image = rng().integers(0, 256, shape, dtype=np.uint8)
    before = image.copy()
    example = {"image": image, "label": 3}
    result = op(example, rng())
    assert result is not example and example["image"] is image
    np.testing.assert_array_equal(image, before)
    assert result["label"] == 3
    out = result["image"]
    assert out.dtype == np.uint8 and out.ndim == 3 and out.size
    changed = {ops.ToGray: 1, ops.ToRgb: 3, ops.Decode: 3, ops.DecodeInceptionCrop: 1}
    assert out.shape[-1] == changed.get(type(op), shape[-1])
    again = op({"image": image, "label": 3}, rng())["image"]
    np.testing.assert_array_equal(out, again)  # a function of example and generator


def test_ops_load_no_jax():
    code = (
        "import sys, big_vision_lite.data.ops, big_vision_lite.data.ops.randaugment;"
        "bad = {'jax', 'tensorflow', 'torch', 'PIL'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
