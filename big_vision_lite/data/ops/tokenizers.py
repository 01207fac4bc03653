"""Turns a text into ids: bytes, and files of SentencePiece and of Hugging Face."""

import dataclasses
import functools
import os
from typing import Any, Protocol, runtime_checkable

# How to install the libraries that read tokeniser files.
INSTALL = "pip install -e '.[text]'"


@runtime_checkable
class Tokenizer(Protocol):
    """Splits a text into ids, without marks of beginning or end and without padding."""

    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(kw_only=True)
class Bytes:
    """One id a byte of UTF-8: the byte + `offset`, so 0..offset - 1 are free for marks.

    A model needs a vocabulary of 256 + offset.
    """

    offset: int = 1

    def __post_init__(self):
        if self.offset < 0:
            raise ValueError(f"Bytes(offset={self.offset}): ids start at 0.")

    def encode(self, text: str) -> list[int]:
        return [self.offset + byte for byte in text.encode("utf-8")]


@dataclasses.dataclass(kw_only=True)
class SentencePiece:
    """Ids of a SentencePiece file (.model), read by the sentencepiece package.

    The first use raises FileNotFoundError without the file, ValueError for another
    kind of file, ModuleNotFoundError without the package.
    """

    path: str

    @functools.cached_property
    def _model(self) -> Any:
        library = _import("sentencepiece", self.path)
        _check_file(self.path)
        try:
            return library.SentencePieceProcessor(model_file=self.path)
        except RuntimeError as error:
            raise ValueError(
                f"{self.path} is no SentencePiece model; a tokenizer.json is read by "
                "HuggingFaceTokenizer."
            ) from error

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


@dataclasses.dataclass(kw_only=True)
class HuggingFaceTokenizer:
    """Ids of a tokenizer.json, read by Hugging Face's tokenizers package.

    Normalisation and splitting are the file's; marks, padding and truncation are those
    of Tokenize. The first use raises FileNotFoundError without the file, ValueError for
    another kind of file, ModuleNotFoundError without the package.
    """

    path: str

    @functools.cached_property
    def _model(self) -> Any:
        library = _import("tokenizers", self.path)
        _check_file(self.path)
        try:
            model = library.Tokenizer.from_file(self.path)
        # The library raises nothing narrower.
        except Exception as error:
            raise ValueError(
                f"{self.path} is no tokenizer.json ({error}); a .model file is read by "
                "SentencePiece."
            ) from error
        model.no_padding()
        model.no_truncation()
        return model

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}


def _import(name: str, path: str) -> Any:
    # Imported at use: training on images needs neither.
    try:
        return __import__(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is read by the package {name}, which is not installed: {INSTALL}"
        ) from error


def _check_file(path: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"There is no tokeniser file {path}; give the path of one on this machine."
        )
