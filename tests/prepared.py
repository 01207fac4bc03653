"""Prepared TFDS sets, written by hand, and a look into sources."""

import json
import pathlib
import types
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from big_vision_lite.data.sources.tfds.example import encode_example

FEATURES = "tensorflow_datasets.core.features"


def labels_of(source) -> np.ndarray:
    """Returns the labels of all examples."""
    return np.asarray([source[index]["label"] for index in range(len(source))])


def prepare(
    data_dir: pathlib.Path,
    name: str,
    *,
    shape: tuple[int, int, int],
    num_classes: int,
    splits: dict[str, int],
    label_key: str = "label",
    words: Sequence[Sequence[str]] = (),
    texts: Mapping[str, Sequence] = types.MappingProxyType({}),
) -> None:
    """Writes `data_dir/name/1.0.0` with random images of `shape` in every split.

    With `words` the n-th image has the n-th of them as "tags", from the first again.
    `texts` are features {name: values in turn}; a tuple is a list of texts, and under
    "a/b" all values are.
    """
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True)
    # "imagenette/160px" is the folder of a variant; its files have the set's name.
    name = name.partition("/")[0]
    rng = np.random.default_rng(0)
    infos = []
    for split, count in splits.items():
        path = folder / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number in range(count):
            pixels = rng.integers(0, 256, shape, np.uint8)
            image = cv2.imencode(".png", pixels)[1].tobytes()
            label = number % num_classes
            example = {"image": image, label_key: label}
            if words:
                example["tags"] = [w.encode() for w in words[number % len(words)]]
            more = {key: _bytes(x[number % len(x)]) for key, x in texts.items()}
            writer.write(encode_example(example | more))
        writer.close()
        infos.append(
            {
                "name": split,
                "shardLengths": [str(count)],
                "numBytes": str(path.stat().st_size),
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {
        "name": name,
        "version": "1.0.0",
        "fileFormat": "array_record",
        "splits": infos,
    }
    features = {
        "image": {
            "pythonClassName": f"{FEATURES}.image_feature.Image",
            "image": {
                "dtype": "uint8",
                "encodingFormat": "png",
                "shape": {"dimensions": [str(n) for n in shape]},
            },
        },
        label_key: {
            "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": str(num_classes)},
        },
    }
    if words:
        features["tags"] = {
            "pythonClassName": f"{FEATURES}.sequence_feature.Sequence",
            "sequence": {
                "feature": {
                    "pythonClassName": f"{FEATURES}.text_feature.Text",
                    "text": {},
                }
            },
        }
    text = {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}
    for key in texts:
        name, _, inner = key.partition("/")
        features[name] = text if not inner else _listed({inner: text})
    whole = {
        "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(whole))
    names = "".join(f"class {number}\n" for number in range(num_classes))
    (folder / "label.labels.txt").write_text(names)


def _bytes(text):
    return text.encode() if isinstance(text, str) else [x.encode() for x in text]


def _listed(features):
    """Returns a list of examples with these features, as TFDS describes it."""
    inside = {
        "pythonClassName": f"{FEATURES}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    return {
        "pythonClassName": f"{FEATURES}.sequence_feature.Sequence",
        "sequence": {"feature": inside, "length": "-1"},
    }
