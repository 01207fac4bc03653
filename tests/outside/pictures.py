"""A source of drawn shapes with a mask and a caption, and a tokenising op."""

import dataclasses
import zlib

import cv2
import numpy as np
import shapes_run


@dataclasses.dataclass(kw_only=True)
class Pictures:
    """`count` PNGs of 24 px with the `keys` "mask" and "caption" as asked for."""

    count: int = 48
    seed: int = 0
    keys: tuple[str, ...] = ()

    class_names = ()

    @property
    def fingerprint(self):
        return f"pictures {self.count} {self.seed} {self.keys}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = range(self.count)[index]
        kind = shapes_run.CLASSES[index % 3]
        rng = np.random.default_rng((self.seed, index))
        image = shapes_run.draw(kind, rng)
        # Shapes are bright, the noise around them is below 60.
        mask = (image.max(axis=-1) > 100).astype(np.uint8)
        found = {
            "image": _png(image[..., ::-1]),
            "mask": _png(mask),
            "caption": f"a {kind} on noise",
        }
        return {key: found[key] for key in ("image", *self.keys)}

    def name(self, index):
        return f"picture {index}"


@dataclasses.dataclass(kw_only=True)
class Tokenise:
    """Words of "caption" to "text", int32 [length] below `vocabulary`, 0 for none."""

    length: int = 6
    vocabulary: int = 128

    def __call__(self, example, rng):
        example = dict(example)
        words = example.pop("caption").split()[: self.length]
        ids = [1 + zlib.crc32(w.encode()) % (self.vocabulary - 1) for w in words]
        ids += [0] * (self.length - len(ids))
        return example | {"text": np.array(ids, np.int32)}


def _png(image):
    encoded, data = cv2.imencode(".png", image)
    assert encoded
    return data.tobytes()
