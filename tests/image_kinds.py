"""Files of every kind that Pillow writes, and some that it only reads."""

import io
import struct
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import PIL.ImageCms
from png_files import png

from big_vision_lite.data.ops import jpeg_parts

Pixels = np.ndarray


def drawing(rng: np.random.Generator) -> Pixels:
    """Smooth colours with noise, of a size of its own: uint8 [H, W, 4]."""
    height, width = (int(side) for side in rng.integers(9, 40, 2))
    coarse = rng.integers(0, 256, (3, 4, 4), np.uint8)
    smooth = PIL.Image.fromarray(coarse).resize((width, height))
    pixels = np.asarray(smooth).copy()
    noise = rng.integers(0, 16, pixels.shape)
    pixels[...] = np.clip(pixels.astype(int) + noise, 0, 255)
    # Both ends of transparency, not only the way between them.
    pixels[:3, :4, 3], pixels[3:5, :, 3] = 0, 255
    return pixels


def image(pixels: Pixels, mode: str) -> PIL.Image.Image:
    """The drawing in one of Pillow's modes; 16 bit in those that have it."""
    rgba = PIL.Image.fromarray(pixels)
    if mode in ("I;16", "I", "F"):
        gray = np.asarray(rgba.convert("L")).astype(np.uint16) * 257 - 40
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return PIL.Image.fromarray(gray.clip(0, 65535).astype(kind))
    if mode == "CMYK":
        return PIL.Image.fromarray(pixels, "CMYK")
    if mode == "RGBX":
        return PIL.Image.fromarray(pixels, "RGBX")
    if mode == "LAB":
        return PIL.Image.fromarray(pixels[..., :3].copy(), "LAB")
    if mode == "PA":
        return image(pixels, "P").convert("PA")
    if mode in ("LA", "RGBA"):
        return rgba.convert(mode)
    return rgba.convert("RGB").convert(mode)


def profile() -> bytes:
    return PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()


def exif(orientation: int) -> bytes:
    found = PIL.Image.Exif()
    found[0x112] = orientation
    return found.tobytes()


def saved(format: str, mode: str, **options) -> Callable[[np.random.Generator], bytes]:
    """Returns what makes a file from a seed, by Pillow."""

    def make(rng: np.random.Generator) -> bytes:
        file = io.BytesIO()
        given = dict(options)
        if frames := given.pop("frames", 0):
            given |= {"save_all": True}
            size = drawing(np.random.default_rng(5)).shape[:2][::-1]
            more = [image(drawing(rng), mode).resize(size) for _ in range(frames)]
            given["append_images"] = more[1:]
            more[0].save(file, format, **given)
            return file.getvalue()
        image(drawing(rng), mode).save(file, format, **given)
        return file.getvalue()

    return make


def sixteen(kind: int, *chunks: tuple[bytes, bytes]):
    """PNG of 16 bit in a colour type that Pillow does not write."""

    def make(rng: np.random.Generator) -> bytes:
        count = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
        height, width = (int(side) for side in rng.integers(3, 30, 2))
        samples = rng.integers(0, 65536, (height, width * count)).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in samples)
        return png(width, height, 16, kind, rows, *chunks)

    return make


def bmp(header: int, bits: int, compression: int, masks: tuple[int, ...], alpha: int):
    """BMP of 16 or 32 bit with the channels where the masks say."""

    def make(rng: np.random.Generator) -> bytes:
        pixels = drawing(rng).astype(np.uint64)
        height, width = pixels.shape[:2]
        pixels[..., 3] = {0: 0, 255: 255}.get(alpha, pixels[..., 3])
        default = (0xFF0000, 0xFF00, 0xFF) if bits == 32 else (0x7C00, 0x3E0, 0x1F)
        packed = np.zeros((height, width), np.uint64)
        for channel, mask in enumerate(masks or default):
            if mask:
                low = (mask & -mask).bit_length() - 1
                count = mask.bit_count()
                packed |= (pixels[..., channel] >> (8 - count)) << low
        if len(masks or default) == 3 and bits == 32 and not masks and alpha != 0:
            packed |= pixels[..., 3] << 24
        raw = packed.astype(f"<u{bits // 8}")[::-1]
        padded = [row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in raw]
        body = b"".join(padded)
        info = struct.pack(
            *("<IiiHHIIiiII", header, width, height, 1, bits, compression),
            *(len(body), 2835, 2835, 0, 0),
        )
        words = struct.pack("<4I", *(*masks, 0, 0, 0, 0)[:4])
        if header == 40:
            info += words[:12] if compression == 3 else b""
        else:
            info = (info + words + b"BGRs" + bytes(80))[:header]
        start = 14 + len(info)
        return (
            b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + body
        )

    return make


def sampled(*factors: tuple[int, int]) -> Callable[[np.random.Generator], bytes]:
    """JPEG of flat blocks with these sampling factors (across, down), by hand."""

    def make(rng: np.random.Generator) -> bytes:
        file = io.BytesIO()
        PIL.Image.new("RGB", (16, 16)).save(file, "JPEG")
        found = list(jpeg_parts.parts(file.getvalue()))
        tables = [part.body for part in found if part.marker == jpeg_parts.DHT]
        codes = {body[0]: huffman_codes(body) for body in tables}
        across, down = (max(sides) for sides in zip(*factors, strict=True))
        width, height = (int(side) for side in rng.integers(9, 70, 2))
        units = -(-width // (8 * across)) * -(-height // (8 * down))
        bits, before = "", [0] * len(factors)
        for _ in range(units):
            for number, (columns, rows) in enumerate(factors):
                for _ in range(columns * rows):
                    level = int(rng.integers(-200, 200))
                    size, value = magnitude(level - before[number])
                    before[number] = level
                    chroma = min(number, 1)
                    bits += codes[chroma][size] + value + codes[16 + chroma][0]
        bits += "1" * (-len(bits) % 8)
        scan = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
        sides = struct.pack(">BHHB", 8, height, width, len(factors))
        rows = [(n + 1, a << 4 | d, min(n, 1)) for n, (a, d) in enumerate(factors)]
        frame = sides + b"".join(map(bytes, rows))
        data = b"\xff\xd8"
        for part in found:
            if part.marker == 0xC0:
                part = jpeg_parts.Part(marker=0xC0, body=frame)
            if part.marker == jpeg_parts.SOS:
                stuffed = scan.replace(b"\xff", b"\xff\0")
                part = jpeg_parts.Part(marker=0xDA, body=part.body, scan=stuffed)
            data += part.joined()
        return data

    return make


def huffman_codes(body: bytes) -> dict[int, str]:
    """The bits of every symbol of one table."""
    symbols, codes, code = iter(body[17:]), {}, 0
    for length, count in enumerate(body[1:17], 1):
        for _ in range(count):
            codes[next(symbols)] = f"{code:0{length}b}"
            code += 1
        code <<= 1
    return codes


def magnitude(value: int) -> tuple[int, str]:
    """The number of bits of a coefficient and the bits themselves."""
    size = abs(value).bit_length()
    if not size:
        return 0, ""
    return size, f"{value if value > 0 else value + (1 << size) - 1:0{size}b}"


def palette_alpha(rng: np.random.Generator) -> bytes:
    file = io.BytesIO()
    indexed = image(drawing(rng), "P")
    indexed.save(file, "PNG", transparency=bytes(range(0, 256, 2)))
    return file.getvalue()


def _kinds() -> Iterator[tuple[str, Callable[[np.random.Generator], bytes]]]:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        yield f"PNG {mode}", saved("PNG", mode)
    for bits in (1, 2, 4):
        yield f"PNG P of {bits} bit", saved("PNG", "P", bits=bits)
    yield "PNG 1 of transparency", saved("PNG", "1", transparency=0)
    yield "PNG L of transparency", saved("PNG", "L", transparency=90)
    yield "PNG P of transparency", saved("PNG", "P", transparency=3)
    yield "PNG P of alpha", palette_alpha
    yield "PNG RGB of transparency", saved("PNG", "RGB", transparency=(9, 9, 9))
    yield "PNG I;16 of transparency", saved("PNG", "I;16", transparency=257)
    yield "PNG gray of 16 bit", sixteen(0)
    yield "PNG RGB of 16 bit", sixteen(2)
    yield "PNG LA of 16 bit", sixteen(4)
    yield "PNG RGBA of 16 bit", sixteen(6)
    yield "PNG gray of 16 bit, gamma", sixteen(0, (b"gAMA", struct.pack(">I", 45455)))
    for mode in ("RGB", "RGBA", "P", "L"):
        yield f"PNG {mode}, ICC", saved("PNG", mode, icc_profile=profile())
    yield "PNG RGB, EXIF", saved("PNG", "RGB", exif=exif(6))
    yield "PNG RGB, not compressed", saved("PNG", "RGB", compress_level=0)
    yield "PNG RGB, optimised", saved("PNG", "RGB", optimize=True, dpi=(300, 300))
    for mode in ("RGB", "RGBA", "P", "L"):
        yield f"PNG {mode}, animated", saved("PNG", mode, frames=3)
    yield (
        "PNG RGBA, animated, a default image",
        saved("PNG", "RGBA", frames=3, default_image=True),
    )
    for mode in ("L", "RGB", "CMYK"):
        yield f"JPEG {mode}", saved("JPEG", mode, quality=90)
        yield f"JPEG {mode}, progressive", saved("JPEG", mode, progressive=True)
        yield f"JPEG {mode}, ICC", saved("JPEG", mode, icc_profile=profile())
        yield (
            f"JPEG {mode}, restarts",
            saved("JPEG", mode, restart_marker_blocks=2, optimize=True),
        )
    for sampling in ("4:4:4", "4:2:2", "4:2:0"):
        yield f"JPEG {sampling}", saved("JPEG", "RGB", subsampling=sampling)
    for factors in (
        ((3, 1), (1, 1), (1, 1)),
        ((2, 4), (1, 1), (1, 1)),
        ((1, 4), (1, 1), (1, 1)),
        ((4, 2), (1, 1), (1, 1)),
        ((1, 1), (2, 2), (1, 1)),
        ((2, 1), (1, 2), (1, 1)),
        ((2, 2), (2, 1), (1, 1)),
        ((1, 3), (1, 1), (1, 1)),
        ((3, 2), (1, 1), (1, 1)),
        ((1, 1), (1, 1), (2, 1)),
    ):
        name = " ".join(f"{across}x{down}" for across, down in factors)
        yield f"JPEG sampled {name}", sampled(*factors)
    yield "JPEG 1", saved("JPEG", "1")
    yield "JPEG RGB kept", saved("JPEG", "RGB", keep_rgb=True)
    yield "JPEG RGB, EXIF", saved("JPEG", "RGB", exif=exif(6))
    yield "JPEG RGB, comment", saved("JPEG", "RGB", comment=b"drawn", dpi=(72, 72))
    yield "JPEG RGB, quality 1", saved("JPEG", "RGB", quality=1)
    yield "JPEG of two pictures", saved("MPO", "RGB", frames=2)
    for mode in ("RGB", "RGBA"):
        yield f"WebP {mode}", saved("WEBP", mode)
        yield f"WebP {mode}, lossless", saved("WEBP", mode, lossless=True)
        yield f"WebP {mode}, ICC", saved("WEBP", mode, icc_profile=profile())
        yield f"WebP {mode}, EXIF", saved("WEBP", mode, exif=exif(6))
        yield f"WebP {mode}, animated", saved("WEBP", mode, frames=3)
    yield "WebP RGBA, exact", saved("WEBP", "RGBA", lossless=True, exact=True)
    yield "WebP RGBA, coarse alpha", saved("WEBP", "RGBA", alpha_quality=10)
    yield "WebP L", saved("WEBP", "L")
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"GIF {mode}", saved("GIF", mode)
        yield f"GIF {mode}, animated", saved("GIF", mode, frames=3)
    yield "GIF P of transparency", saved("GIF", "P", transparency=3)
    yield "GIF L of transparency", saved("GIF", "L", transparency=90)
    yield "GIF P, rows in order", saved("GIF", "P", interlace=0)
    yield "GIF P, comment", saved("GIF", "P", comment=b"drawn")
    yield (
        "GIF RGBA, animated, cleared",
        saved("GIF", "RGBA", frames=3, disposal=2, loop=0),
    )
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", saved("BMP", mode)
    for name, header, masks in (
        ("three masks", 40, (0xFF0000, 0xFF00, 0xFF)),
        ("V4, no alpha", 108, (0xFF0000, 0xFF00, 0xFF)),
        ("V5, red last", 124, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
        ("V5, alpha first", 124, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
        ("V5, alpha", 124, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    ):
        for alpha in (0, 255, 9):
            word = {0: "0", 255: "255"}.get(alpha, "mixed")
            yield f"BMP of 32 bit, {name}, {word}", bmp(header, 32, 3, masks, alpha)
    yield "BMP of 32 bit, unused 0", bmp(40, 32, 0, (), 0)
    yield "BMP of 32 bit, unused mixed", bmp(40, 32, 0, (), 9)
    yield "BMP of 16 bit, 555", bmp(40, 16, 0, (), 0)
    yield "BMP of 16 bit, 565", bmp(40, 16, 3, (0xF800, 0x7E0, 0x1F), 0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "I;16"):
        yield f"TIFF {mode}", saved("TIFF", mode)
    for mode in ("PA", "LAB", "I", "F"):
        yield f"TIFF {mode}", saved("TIFF", mode)
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd"):
        for mode in ("L", "RGB", "RGBA", "I;16"):
            yield f"TIFF {mode}, {packing}", saved("TIFF", mode, compression=packing)
    yield "TIFF CMYK, lzw", saved("TIFF", "CMYK", compression="tiff_lzw")
    yield "TIFF RGB, jpeg", saved("TIFF", "RGB", compression="jpeg")
    yield "TIFF L, jpeg", saved("TIFF", "L", compression="jpeg")
    yield "TIFF YCbCr, jpeg", saved("TIFF", "YCbCr", compression="jpeg")
    yield "TIFF 1, group 3", saved("TIFF", "1", compression="group3")
    yield "TIFF 1, group 4", saved("TIFF", "1", compression="group4")
    yield "TIFF RGB, big", saved("TIFF", "RGB", big_tiff=True)
    yield "TIFF RGB, ICC", saved("TIFF", "RGB", icc_profile=profile())
    yield "TIFF RGB, EXIF", saved("TIFF", "RGB", exif=exif(6))
    yield "TIFF RGB, pages", saved("TIFF", "RGB", frames=3)
    yield (
        "TIFF RGB, lzw of differences",
        saved("TIFF", "RGB", compression="tiff_lzw", tiffinfo={317: 2}),
    )
    for sampling in ("4:4:4", "4:2:2", "4:2:0", "4:0:0"):
        yield f"AVIF {sampling}", saved("AVIF", "RGB", subsampling=sampling, speed=10)
    yield "AVIF RGBA", saved("AVIF", "RGBA", speed=10)
    yield (
        "AVIF RGBA, premultiplied",
        saved("AVIF", "RGBA", speed=10, alpha_premultiplied=True),
    )
    yield "AVIF RGB, quality 100", saved("AVIF", "RGB", speed=10, quality=100)
    yield "AVIF RGB, limited range", saved("AVIF", "RGB", speed=10, range="limited")
    yield "AVIF RGB, ICC", saved("AVIF", "RGB", speed=10, icc_profile=profile())
    yield "AVIF RGB, EXIF", saved("AVIF", "RGB", speed=10, exif=exif(6))
    yield "AVIF RGB, animated", saved("AVIF", "RGB", frames=3, speed=10)


# What makes a file of each kind from a generator.
KINDS = dict(_kinds())


def on_white(data: bytes) -> Pixels:
    """Pillow's pixels of the first picture on white: uint8 [H, W, 3].

    16-bit samples keep their high byte; Pillow would cut them off at 255.
    """
    found = PIL.Image.open(io.BytesIO(data))
    if found.format == "TIFF" and found.getexif().get(0x112) == 6:
        # Of TIFFs alone Pillow turns the pixels as EXIF says.
        found = found.transpose(PIL.Image.Transpose.ROTATE_90)
    if found.mode.startswith("I;16"):
        high = (np.asarray(found) >> 8).astype(np.uint8)
        clear = found.info.get("transparency")
        if clear is not None:
            high[np.asarray(found) == clear] = 255
        return np.repeat(high[..., None], 3, -1)
    rgba = np.asarray(found.convert("RGBA")).astype(int)
    color, alpha = rgba[..., :3], rgba[..., 3:]
    if data.startswith(b"BM") and not alpha.any():  # nothing was meant by it
        return color.astype(np.uint8)
    return np.rint((color * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)
