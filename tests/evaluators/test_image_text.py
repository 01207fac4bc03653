"""Zero-shot classification and retrieval by a model whose answers are known."""

import dataclasses
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_context import Network, make_context, make_mesh, make_state

from big_vision_lite.data.ops.text import Tokenize
from big_vision_lite.data.sources.arrays import InMemory
from big_vision_lite.evaluators.retrieval import Retrieval, recalls
from big_vision_lite.evaluators.zero_shot import ZeroShot
from big_vision_lite.types import Model


def unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Towers(nn.Module, Model):
    """An image is its pixels; a text is the counts of the letters a, b, c and d."""

    @nn.compact
    def __call__(self, image=None, text=None, train=False):
        gain = self.param("gain", nn.initializers.ones, ())
        found = {}
        if image is not None:
            pixels = image.reshape(len(image), -1).astype(jnp.float32)
            found["image_embedding"] = unit(pixels * gain)
        if text is not None:
            letters = jnp.arange(ord("a"), ord("e")) + 1
            counts = (text[:, :, None] == letters).sum(axis=1)
            found["text_embedding"] = unit(counts.astype(jnp.float32) + 1e-3)
        return found


SHAPE = (1, 1, 4)
NAMES = ("first", "second", "third")
TOKENS = Tokenize(length=24)


def images(*rows):
    return np.asarray(rows, np.uint8)[:, None, None, :]


SOURCE = InMemory(
    images=images([9, 0, 0, 0], [0, 9, 0, 0], [0, 8, 7, 0], [0, 0, 9, 1], [9, 8, 0, 0]),
    labels=np.array([0, 1, 2, 2, 1]),
    class_names=NAMES,
)


def run(evaluator, tmp_path, devices=2, messages=None):
    mesh = make_mesh(devices)
    given = dict(image_shape=SHAPE, messages=messages)
    context = make_context(tmp_path, mesh, Towers(), NAMES, **given)
    with jax.set_mesh(mesh):
        return evaluator.prepare(context)(make_state(Towers(), mesh, SHAPE))


def zero_shot(**fields):
    given = dict(source=SOURCE, tokenize=TOKENS, names=("a", "b", "c"), batch_size=8)
    return ZeroShot(**given | fields)


@pytest.mark.parametrize("devices", [1, 8])
def test_zero_shot_names_an_image_by_its_nearest_text(tmp_path, devices):
    found = run(zero_shot(), tmp_path, devices)
    # The third image lies nearer to b, the last to a.
    assert found == {
        "accuracy": 3 / 5,
        "control_chance": 1 / 3,
        "examples": 5,
        "unreadable": 0,
    }


def test_templates_are_averaged_as_unit_vectors(tmp_path):
    # The second template moves c's vector between b and c, and b's not.
    found = run(zero_shot(templates=("{}", "{}bbbb")), tmp_path)
    vectors = []
    for name in "abc":
        prompts = (name, f"{name}bbbb")
        counts = [[text.count(letter) + 1e-3 for letter in "abcd"] for text in prompts]
        vectors.append(np.mean([unit(np.array(x)) for x in counts], axis=0))
    pixels = np.stack([SOURCE[i]["image"] for i in range(5)]).reshape(5, 4)
    nearest = np.asarray(unit(pixels * 1.0) @ unit(np.array(vectors)).T).argmax(axis=1)
    assert found["accuracy"] == float((nearest == [0, 1, 2, 2, 1]).mean())


def test_prompts_are_read_from_a_file(tmp_path):
    file = tmp_path / "prompts.json"
    by_class = {"second": "b", "third": "c", "first": "a", "more": "d"}
    for names in (by_class, ["a", "b", "c"]):
        file.write_text(json.dumps({"names": names, "templates": ["{}"]}))
        evaluator = zero_shot(names=(), templates=("d{}",), file=str(file))
        found = run(evaluator, tmp_path, messages=(messages := []))
        assert found["accuracy"] == 3 / 5
        # Names without their classes are paired by order, which is said.
        said = "first is called 'a', second is called 'b'" in "".join(messages)
        assert said == isinstance(names, list)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "prompts.json is no JSON"),
        ('{"classes": []}', r'prompts.json holds classes; expected {"names"'),
        ("[1]", "prompts.json holds list"),
        ('{"names": [1, 2, 3]}', "names must be texts"),
        ('{"templates": ["a photo"]}', r'each with one "{}"'),
        ('{"names": {"first": "a", "secnd": "b"}}', "does not name second, third"),
        ('{"names": ["a", "b"]}', "2 names for 3 classes"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, content, message):
    file = tmp_path / "prompts.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        run(zero_shot(file=str(file)), tmp_path)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        run(zero_shot(file=str(tmp_path / "none.json")), tmp_path)


def test_what_cannot_be_named_is_refused(tmp_path):
    unlabelled = InMemory(images=images([9, 0, 0, 0]), labels=None)
    with pytest.raises(ValueError, match="has no classes; give a labelled set"):
        run(zero_shot(source=unlabelled), tmp_path)
    several = InMemory(
        images=images([9, 0, 0, 0]), labels=np.array([[1, 1, 0]]), class_names=NAMES
    )
    with pytest.raises(ValueError, match="has several labels an image; zero-shot"):
        run(zero_shot(source=several), tmp_path)
    mesh = make_mesh(2)
    context = make_context(tmp_path, mesh, Network(), NAMES)
    for evaluator in (zero_shot(), Retrieval(source=SOURCE, tokenize=TOKENS)):
        with pytest.raises(ValueError, match="Network takes no text; this is an"):
            evaluator.prepare(context)
    with pytest.raises(ValueError, match=r"templates=\(\)\): give at least one"):
        zero_shot(templates=())


@dataclasses.dataclass
class Captioned:
    """Images with lists of captions."""

    images: np.ndarray
    captions: list

    class_names = ()
    fingerprint = "captioned"

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "caption": self.captions[index]}

    def name(self, index):
        return f"image {index}"


@pytest.mark.parametrize("devices", [1, 8])
def test_retrieval_counts_every_caption_both_ways(tmp_path, devices):
    source = Captioned(
        images([9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]),
        [["a", "aab"], ["ba", "aab"], ["b"]],
    )
    evaluator = Retrieval(
        source=source, tokenize=TOKENS, captions=2, ranks=(1, 2), batch_size=8
    )
    found = run(evaluator, tmp_path, devices)
    # By text: a and the first aab find image 0; "ba" is as near to 0 as to 1, and an
    # equal counts as nearer; the second aab finds image 0; "b" finds image 1, and 0, 2
    # are as far.
    assert found["text_to_image/at_1/recall"] == 2 / 5
    assert found["text_to_image/at_2/recall"] == 4 / 5
    # By image: 0 finds "a"; 1 finds "b", which is not its own, then "ba"; 2 is as far
    # from its "b" as from "a", and farther from the longer ones.
    assert found["image_to_text/at_1/recall"] == 1 / 3
    assert found["image_to_text/at_2/recall"] == 1
    assert found["text_to_image/at_1/control_chance"] == 1 / 3
    one = (2 / 5 + 2 / 5 + 1 / 5) / 3
    assert found["image_to_text/at_1/control_chance"] == pytest.approx(one)
    two = (2 * (1 - 3 / 5 * 2 / 4) + 1 - 4 / 5 * 3 / 4) / 3
    assert found["image_to_text/at_2/control_chance"] == pytest.approx(two)
    assert (found["texts"], found["examples"]) == (5, 3)


def test_a_model_that_says_the_same_of_all_finds_nothing():
    same = np.ones((6, 3), np.float32)
    valid = np.ones((6, 2), bool)
    found = recalls(same, np.ones((6, 2, 3), np.float32), valid, (1, 5))
    shares = {n: x for n, x in found.items() if n.endswith("recall")}
    assert shares and not any(shares.values())


def test_recalls_equal_a_loop():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 4)).astype(np.float32)
    texts = rng.standard_normal((20, 3, 4)).astype(np.float32)
    valid = rng.random((20, 3)) < 0.7
    valid[:, 0] = True
    found = recalls(x, texts, valid, (1, 5))
    pairs = [(m, k) for m in range(20) for k in range(3) if valid[m, k]]
    for rank in (1, 5):
        hits = 0
        for m, k in pairs:
            order = np.argsort(-(x @ texts[m, k]))
            hits += m in order[:rank]
        assert found[f"text_to_image/at_{rank}/recall"] == hits / len(pairs)
        hits = 0
        for m in range(20):
            scores = [x[m] @ texts[pair] for pair in pairs]
            order = np.argsort(scores)[::-1][:rank]
            hits += any(pairs[place][0] == m for place in order)
        assert found[f"image_to_text/at_{rank}/recall"] == hits / 20
    assert math.isclose(found["text_to_image/at_5/control_chance"], 5 / 20)


def test_fields_of_retrieval_are_checked():
    with pytest.raises(ValueError, match="both start at 1; COCO has 5"):
        Retrieval(source=SOURCE, tokenize=TOKENS, captions=0)
