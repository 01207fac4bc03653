"""Captions become ids, by bytes and by files that the tests train."""

import io
import pickle
import sys
import warnings

import numpy as np
import pytest

from big_vision_lite.data.ops.text import (
    Describe,
    Empty,
    Spelling,
    Tokenize,
    TooLong,
)
from big_vision_lite.data.ops.tokenizers import (
    Bytes,
    HuggingFaceTokenizer,
    SentencePiece,
)
from big_vision_lite.data.undecodable import UndecodableImage

RNG = np.random.default_rng(0)
CORPUS = [
    "a small cat sits on the mat",
    "the dog runs to a small house",
    "two cats and a dog at the house",
    "a mat in front of the house",
] * 4


def ids(op, caption):
    return op({"image": 1, "caption": caption}, RNG)["text"].tolist()


def test_bytes_are_utf8_and_what_is_left_is_padding():
    op = Tokenize(length=6)
    assert ids(op, "aé") == [98, 1 + 0xC3, 1 + 0xA9, 0, 0, 0]
    found = op({"image": 1, "caption": "a"}, RNG)
    assert found["text"].dtype == np.int32 and found.keys() == {"image", "text"}


def test_the_end_stays_where_a_text_is_cut():
    op = Tokenize(tokenizer=Bytes(offset=3), length=5, begin=1, end=2)
    assert ids(op, "ab") == [1, 100, 101, 2, 0]
    with pytest.warns(UserWarning, match="of more than length=5 ids are cut"):
        assert ids(op, "abcdef") == [1, 100, 101, 102, 2]


def test_cutting_is_said_once(recwarn):
    warnings.simplefilter("default")
    op = Tokenize(length=2)
    for text in ("abc", "defgh", "ijklmn"):
        ids(op, text)
    assert len(recwarn) == 1


def test_long_and_empty_texts_are_refused_in_sentences():
    with pytest.raises(ValueError, match="'abc' has 3 ids and 1 marks, more than len"):
        ids(Tokenize(length=3, end=1, too_long=TooLong.REFUSE), "abc")
    with pytest.raises(ValueError, match="is '', of which no id is left"):
        ids(Tokenize(), "")
    with pytest.raises(UndecodableImage, match=r"'!\?', of which no id is left"):
        ids(Tokenize(spelling=Spelling.CANONICAL, empty=Empty.SKIP), "!?")
    assert ids(Tokenize(length=3, end=7, empty=Empty.KEEP), "") == [7, 0, 0]


def test_spelling_is_that_of_siglip():
    op = Tokenize(length=9, spelling=Spelling.CANONICAL)
    assert ids(op, "  A b,\nC! ") == ids(Tokenize(length=9), "a b c")
    assert ids(Tokenize(length=4, spelling=Spelling.LOWER), "A.B") == [98, 47, 99, 0]


def test_of_several_captions_one_is_drawn_or_the_first_are_taken():
    captions = ["a", "b", "c"]
    op = Tokenize(length=1)
    seen = {
        int(op({"caption": captions}, np.random.default_rng(seed))["text"][0])
        for seed in range(20)
    }
    assert seen == {98, 99, 100}
    found = Tokenize(length=1, captions=2)({"caption": captions}, RNG)
    assert found["text"].tolist() == [[98], [99]] and found["text_valid"].all()
    found = Tokenize(length=1, captions=4)({"caption": "b"}, RNG)
    assert found["text"].tolist() == [[99], [0], [0], [0]]
    assert found["text_valid"].tolist() == [True, False, False, False]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(length=2, begin=1, end=1), "the length is at least 3"),
        (dict(captions=-1), "captions=0 takes one"),
    ],
)
def test_fields_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Tokenize(**fields)


def test_what_is_no_caption_is_refused():
    with pytest.raises(ValueError, match=r'no "caption" among captions.*Did you mean'):
        Tokenize()({"captions": "a"}, RNG)
    with pytest.raises(ValueError, match='"caption" is int, not a text'):
        Tokenize()({"caption": 3}, RNG)
    with pytest.raises(ValueError, match='"caption" is none, not a text'):
        Tokenize()({"caption": []}, RNG)


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=28,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "small.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_sentencepiece_files_are_read_by_their_library(sentencepiece_file):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_file)
    ours = SentencePiece(path=sentencepiece_file)
    text = "the small dog sits"
    assert ours.encode(text) == theirs.encode(text) and len(ours.encode(text)) > 3
    op = pickle.loads(pickle.dumps(Tokenize(tokenizer=ours, length=32, end=1)))
    found = ids(op, text)
    assert found[: len(ours.encode(text)) + 1] == [*ours.encode(text), 1]
    assert theirs.decode(found[: found.index(1)]) == text


@pytest.fixture(scope="module")
def tokenizers_file(tmp_path_factory):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    trainer = library.trainers.BpeTrainer(
        vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[END]"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = library.processors.TemplateProcessing(
        single="$A [END]", special_tokens=[("[END]", 2)]
    )
    # The op pads and cuts, whatever the file would do.
    made.enable_padding(length=50)
    made.enable_truncation(2)
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def test_hugging_face_files_are_read_by_their_library(tokenizers_file):
    import tokenizers

    theirs = tokenizers.Tokenizer.from_file(tokenizers_file)
    theirs.no_padding()
    theirs.no_truncation()
    ours = HuggingFaceTokenizer(path=tokenizers_file)
    text = "the small dog sits"
    expected = theirs.encode(text).ids
    assert expected[-1] == 2 and [*ours.encode(text), 2] == expected
    op = pickle.loads(pickle.dumps(Tokenize(tokenizer=ours, length=32, end=2)))
    assert ids(op, text) == expected + [0] * (32 - len(expected))


@pytest.mark.parametrize("kind", [SentencePiece, HuggingFaceTokenizer])
def test_other_files_and_missing_libraries_are_said(kind, tmp_path, monkeypatch):
    module = "sentencepiece" if kind is SentencePiece else "tokenizers"
    pytest.importorskip(module)
    with pytest.raises(FileNotFoundError, match="no tokeniser file .*none.model"):
        kind(path=str(tmp_path / "none.model")).encode("a")
    other = tmp_path / "other.bin"
    other.write_bytes(b"no tokeniser at all")
    with pytest.raises(ValueError, match="other.bin is no .*read by"):
        kind(path=str(other)).encode("a")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{module}.*pip install -e .*text"):
        kind(path=str(other)).encode("a")


def test_a_caption_is_written_from_a_label_and_words_of_a_name():
    op = Describe(
        names=("digit 0", "capital A"),
        text="font",
        words=("bold", "italic", "oblique=>italic"),
    )
    found = op({"image": 1, "label": 1, "font": "x/DejaVu-BoldOblique.ttf"}, RNG)
    assert found == {"image": 1, "label": 1, "caption": "capital A bold italic"}
    found = op({"label": 0, "font": "Bold"}, RNG)
    assert found["caption"] == "digit 0 bold"
    assert Describe(names=("one",))({"label": 0}, RNG)["caption"] == "one"
    with pytest.raises(ValueError, match="the label 2 is none of 2 names"):
        op({"label": 2, "font": ""}, RNG)
    with pytest.raises(ValueError, match="no font among label; let the source"):
        op({"label": 1}, RNG)
    with pytest.raises(ValueError, match="give both or none"):
        Describe(names=("a",), text="font")
