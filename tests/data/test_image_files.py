"""Every kind of image file decodes to Pillow's pixels or is refused by name.

And damaged ones are refused, without a crash, a hang or much memory.
"""

import dataclasses
import io
import json
import os
import pathlib
import struct
import subprocess
import sys

import image_kinds
import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from big_vision_lite.data import ops
from big_vision_lite.data.ops import jpeg_parts
from big_vision_lite.data.ops.decode import UndecodableImage, decode
from big_vision_lite.data.ops.orientation import Orientation

TESTS = pathlib.Path(__file__).parents[1]
# What `decode` says it does not read, by name.
REFUSED = {
    "TIFF I": "TIFF holds 32-bit integers",
    "TIFF F": "TIFF holds floats",
    "TIFF LAB": "TIFF holds LAB colours",
}


def rng(seed=0):
    return np.random.default_rng(seed)


def same_as_pillow(name, data):
    if name in REFUSED:
        with pytest.raises(UndecodableImage, match=REFUSED[name]):
            decode(data)
        return
    # Of the inks of a JPEG, which TurboJPEG and Pillow round on the way to RGB.
    atol = 2 if name.startswith("JPEG CMYK") else 0
    found = decode(data)
    np.testing.assert_allclose(found, image_kinds.on_white(data), atol=atol)
    found[0] = 0  # an op may write into it


@pytest.mark.parametrize("name", image_kinds.KINDS)
def test_a_file_of_each_kind_decodes_to_the_pixels_of_pillow(name):
    same_as_pillow(name, image_kinds.KINDS[name](rng()))


@pytest.mark.slow
def test_a_folder_of_2000_files_decodes_to_the_pixels_of_pillow(tmp_path):
    names = list(image_kinds.KINDS)
    assert len(names) > 60
    for number in range(2000):
        name = names[number % len(names)]
        (tmp_path / str(number)).write_bytes(image_kinds.KINDS[name](rng(number)))
    for number in range(2000):
        data = (tmp_path / str(number)).read_bytes()
        same_as_pillow(names[number % len(names)], data)


@pytest.mark.parametrize("name", image_kinds.KINDS)
def test_a_file_that_is_cut_is_refused_or_has_the_whole_picture(name):
    data = image_kinds.KINDS[name](rng(1))
    if name in REFUSED:
        return
    whole = decode(data)
    for length in {1, 2, 3, 12, 13, *np.linspace(20, len(data) - 1, 12, dtype=int)}:
        try:
            cut = decode(data[:-length])
        except UndecodableImage:
            continue
        np.testing.assert_array_equal(cut, whole)


def mutations(first, last):
    """Decodes damaged files in another process; returns what it reports."""
    done = subprocess.run(
        [sys.executable, TESTS / "mutated_images.py", str(first), str(last)],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60 + (last - first),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "first, last", [(0, 330), pytest.param(330, 10_000, marks=pytest.mark.slow)]
)
def test_damaged_files_neither_crash_nor_hang_and_missing_data_is_said(first, last):
    found = mutations(first, last)
    counts = found["counts"]
    assert not found["silent"]
    assert counts["decoded"] > 0 and counts["libjpeg misses data"] > 0
    assert counts["decoded"] + counts["refused"] == last - first
    assert found["slowest"][0] < 10  # seconds; under a busy machine
    assert found["peak_gib"] < 1


# JPEGs with odd headers


def photo(mode="RGB", **options):
    return image_kinds.saved("JPEG", mode, quality=95, **options)(rng(4))


def marker(kind, body):
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def before(data, kind, put):
    at = data.index(bytes([0xFF, kind]))
    return data[:at] + put + data[at:]


def without_jfif(data):
    length = int.from_bytes(data[4:6], "big")
    return data[:2] + data[4 + length :]


def spectrum(data, *fields):
    at = data.index(b"\xff\xda")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[: end - 3] + bytes(fields) + data[end:]


def padded_scans(data, count):
    """Zeros after every scan of a progressive JPEG but the last."""
    found = list(jpeg_parts.parts(data))
    last = max(n for n, part in enumerate(found) if part.scan)
    padded = [
        dataclasses.replace(part, scan=part.scan + bytes(count))
        if part.scan and number < last
        else part
        for number, part in enumerate(found)
    ]
    return b"\xff\xd8" + b"".join(part.joined() for part in padded)


def adobe(transform):
    return marker(0xEE, b"Adobe" + struct.pack(">HHHB", 100, 0, 0, transform))


PLAIN, GRAY, PROGRESSIVE = photo(), photo("L"), photo(progressive=True)
INK = photo("CMYK")
PROFILE = b"ICC_PROFILE\0"
# The bytes, and the JPEG that has the same pixels.
ODD_HEADERS = {
    "JFIF version 0.00": (PLAIN[:11] + b"\0\0" + PLAIN[13:], PLAIN),
    "JFIF version 2.01": (PLAIN[:11] + b"\2\1" + PLAIN[13:], PLAIN),
    "zeros before the scan": (before(PLAIN, 0xDA, bytes(4)), PLAIN),
    "zeros before the tables": (before(PLAIN, 0xDB, bytes(1)), PLAIN),
    "text before the frame": (before(PLAIN, 0xC0, b"made by hand"), PLAIN),
    "zeros in two places": (
        before(before(PLAIN, 0xC4, bytes(3)), 0xDB, bytes(2)),
        PLAIN,
    ),
    "a version, zeros and a spectrum": (
        spectrum(before(PLAIN[:11] + b"\7\0" + PLAIN[13:], 0xC4, bytes(5)), 0, 0, 0),
        PLAIN,
    ),
    "an ICC part that is missing": (
        before(PLAIN, 0xDB, marker(0xE2, PROFILE + b"\1\3abcd")),
        PLAIN,
    ),
    "an ICC part that comes twice": (
        before(PLAIN, 0xDB, 2 * marker(0xE2, PROFILE + b"\1\1abcd")),
        PLAIN,
    ),
    "an ICC part 0 of 0": (
        before(PLAIN, 0xDB, marker(0xE2, PROFILE + bytes(2))),
        PLAIN,
    ),
    "a spectrum that ends at 0": (spectrum(PLAIN, 0, 0, 0), PLAIN),
    "a spectrum of refinement": (spectrum(GRAY, 0, 63, 1), GRAY),
    "Adobe's transform 2 of RGB": (
        PLAIN[:2] + adobe(2) + without_jfif(PLAIN)[2:],
        PLAIN,
    ),
    "zeros between scans": (padded_scans(PROGRESSIVE, 1), PROGRESSIVE),
    "zeros before the end": (PLAIN[:-2] + bytes(9) + PLAIN[-2:], PLAIN),
    "fill bytes": (before(PLAIN, 0xDA, b"\xff\xff\xff"), PLAIN),
    "text after the end": (PLAIN + b"more", PLAIN),
    "a comment of no bytes": (before(PLAIN, 0xDB, marker(0xFE, b"")), PLAIN),
    "a JFIF mark that comes late": (
        before(without_jfif(PLAIN), 0xC0, marker(0xE0, b"JFIF\0\3\3" + bytes(7))),
        PLAIN,
    ),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_an_odd_header_of_a_jpeg_is_no_damage(name):
    data, plain = ODD_HEADERS[name]
    np.testing.assert_array_equal(decode(data), decode(plain))
    np.testing.assert_array_equal(decode(data, 1), decode(plain, 1))
    assert np.array_equal(image_kinds.on_white(data), image_kinds.on_white(plain))


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_missing_data_behind_an_odd_header_is_still_damage(name):
    data = ODD_HEADERS[name][0]
    scan = data.rindex(b"\xff\xda") + 20
    for cut in (data[: scan + 40], data[: scan + 40] + b"\xff\xd9"):
        with pytest.raises(UndecodableImage, match="damaged or cut short"):
            decode(cut)


def test_inks_of_an_unknown_transform_are_those_that_libjpeg_takes():
    at = INK.index(b"Adobe") + 11
    assert INK[at] == 0
    data = INK[:at] + b"\3" + INK[at + 1 :]
    np.testing.assert_allclose(decode(data), image_kinds.on_white(data), atol=2)


def test_every_lost_segment_between_restarts_is_damage():
    data = photo(restart_marker_blocks=1)
    segments = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xd3"]
    for at in segments:
        with pytest.raises(UndecodableImage, match="damaged or cut short"):
            decode(data[:at] + data[data.index(b"\xff\xd4", at) :])


@pytest.mark.parametrize(
    "factors", [((3, 1), (1, 1), (1, 1)), ((1, 1), (2, 2), (1, 1))]
)
def test_damage_to_odd_samplings_is_heard_though_pillow_says_nothing(factors):
    data = image_kinds.sampled(*factors)(rng(3))
    gray = decode(data, 1)
    assert gray.shape == (*decode(data).shape[:2], 1)
    at = data.index(b"\xff\xda") + 14
    for body in (data[at : at + 9], b"\xfe\xfe" * 40, b""):
        broken = data[:at] + body + b"\xff\xd9"
        PIL.Image.open(io.BytesIO(broken)).load()
        with pytest.raises(UndecodableImage, match="damaged or cut short"):
            decode(broken)


# Other formats


@pytest.mark.parametrize(
    "start, name",
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL"),
        (b"8BPS\0\1", "Photoshop"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"P6 2 2 255\n", "netpbm"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
)
def test_other_formats_are_refused_by_name(start, name):
    with pytest.raises(UndecodableImage, match=f"^{name}, which is not read; [a-z ]+"):
        decode(start + bytes(100))


def test_a_picture_of_opencv_is_read_without_a_word(capfd):
    # Of a gray PNG with the profile of RGB OpenCV says so, once an image and epoch.
    decode(image_kinds.KINDS["PNG L, ICC"](rng()))
    assert capfd.readouterr() == ("", "")


def test_the_end_of_a_png_is_no_part_of_the_picture():
    data = image_kinds.KINDS["PNG RGB, ICC"](rng())
    whole = decode(data)
    np.testing.assert_array_equal(decode(data[:-12]), whole)
    flipped = data.replace(b"iCCP", b"iCCQ")  # its checksum fails
    np.testing.assert_array_equal(decode(flipped), whole)
    with pytest.raises(UndecodableImage, match="PNG is damaged"):
        decode(data[:-16] + data[-12:])


def test_twelve_bits_of_a_tiff_keep_their_high_byte():
    values = np.array([[0, 15, 16, 4095], [256, 512, 1024, 2048]], np.uint16)
    a, b = values[:, ::2].ravel(), values[:, 1::2].ravel()
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8)
    tags = {256: 4, 257: 2, 258: 12, 259: 1, 262: 1, 273: 130, 277: 1, 278: 2, 279: 12}
    entries = b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags.items())
    file = struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)
    file = file.ljust(tags[273], b"\0") + packed.tobytes()
    expected = np.repeat((values >> 4).astype(np.uint8)[..., None], 3, -1)
    np.testing.assert_array_equal(decode(file), expected)


# Orientation


def oriented(format, orientation, **options):
    options |= {"exif": image_kinds.exif(orientation)}
    return image_kinds.saved(format, "RGB", **options)(rng(6))


LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}, "JPEG": {}, "AVIF": {}}


@pytest.mark.parametrize("format", LOSSLESS)
def test_orientation_is_ignored_or_applied_as_pillow_does(format):
    for orientation in range(1, 9):
        data = oriented(format, orientation, **LOSSLESS[format])
        stored = PIL.Image.open(io.BytesIO(data))
        shown = PIL.ImageOps.exif_transpose(stored)
        if format != "TIFF":  # Pillow turns these as it loads them
            np.testing.assert_array_equal(decode(data), np.asarray(stored))
        elif orientation == 6:
            expected = image_kinds.on_white(data)
            np.testing.assert_array_equal(decode(data), expected)
        applied = decode(data, orientation=Orientation.APPLY)
        np.testing.assert_array_equal(applied, np.asarray(shown))


def test_every_op_that_decodes_turns_alike():
    data = oriented("PNG", 8)
    shown = decode(data, orientation=Orientation.APPLY)
    for kind, op in (
        ("ignore", ops.DecodeInceptionCrop(size_px=8)),
        ("apply", ops.DecodeInceptionCrop(size_px=8, orientation=Orientation.APPLY)),
    ):
        image = shown if kind == "apply" else decode(data)
        expected = ops.InceptionCrop(size_px=8)({"image": image}, rng())["image"]
        np.testing.assert_array_equal(op({"image": data}, rng())["image"], expected)
    op = ops.Decode(orientation=Orientation.APPLY)
    np.testing.assert_array_equal(op({"image": data}, rng())["image"], shown)
    pixels = decode(data)  # what a source has decoded has no orientation any more
    np.testing.assert_array_equal(op({"image": pixels}, rng())["image"], pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_mask_and_boxes_turn_with_the_image(orientation):
    mask = np.zeros((6, 9), np.uint8)
    mask[1:3, 4:8] = 1
    box = np.array([[1 / 6, 4 / 9, 3 / 6, 8 / 9], [0, 0, 0, 0]], np.float32)
    file = io.BytesIO()
    stored = PIL.Image.fromarray(mask * 200)
    stored.save(file, "PNG", exif=image_kinds.exif(orientation))
    example = {"image": file.getvalue(), "mask": mask, "boxes": box}
    found = ops.Decode(orientation=Orientation.APPLY)(example, rng())
    np.testing.assert_array_equal(found["mask"] * 200, found["image"][..., 0])
    rows, columns = np.nonzero(found["mask"])
    height, width = found["mask"].shape
    around = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    expected = np.array(around) / (height, width, height, width)
    np.testing.assert_allclose(found["boxes"], [expected, [0] * 4], atol=1e-6)
    assert found["boxes"].dtype == np.float32


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0MM\0*\0\0\0\x08",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0nonsense and more of it",
        image_kinds.exif(0),
        image_kinds.exif(9),
        image_kinds.exif(60_000),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about the EXIF
def test_damaged_exif_says_nothing(exif):
    data = before(PLAIN, 0xDB, marker(0xE1, exif))
    applied = decode(data, orientation=Orientation.APPLY)
    np.testing.assert_array_equal(applied, decode(PLAIN))
