"""Generative recommenders: loss and scores are likelihoods of whole texts; runs from a folder of files."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxfed.config.build import build_from_config, load_data
from jaxfed.config.central_twin import with_central
from jaxfed.config.generative_models import read_lines
from jaxfed.config.registry import REGISTRY
from jaxfed.config.schema import make_config
from jaxfed.core.model import with_frozen
from jaxfed.core.tables import unwrap
from jaxfed.core.types import History
from jaxfed.data.packing import pack_cohort
from jaxfed.data.sources.pretrained import read_pretrained
from jaxfed.models.beam_search import build_trie
from jaxfed.models.decoder import Decoder
from jaxfed.models.decoder_weights import convert_llama
from jaxfed.models.generative import code_decoder, decoder_lora, number_codes
from jaxfed.models.lora import LoraSettings
from jaxfed.models.transformer import MASKED_LOGIT
from jaxfed.training.loop import train_run
from jaxfed.training.rounds import initial_arrays, make_run_keys, prepare_round
from tests.small import KEY, close
from tests.small_decoder import CONFIG, random_decoder_tensors, write_decoder

DECODER = convert_llama(CONFIG, random_decoder_tensors())
N, P, WORDS = 30, 4, CONFIG["vocab_size"]
_rng = np.random.default_rng(0)
PIECES = np.where(np.arange(P) < _rng.integers(1, P + 1, (N, 1)), _rng.integers(0, WORDS, (N, P)), WORDS)
READ = [3, 17, 8, 29, 11]


@pytest.fixture(scope="module")
def adapted():
    """(the model, its shared parameters with adapters that change something)."""
    model = decoder_lora(N, DECODER, PIECES, 4, LoraSettings(2, 4.0, "q_proj|v_proj"))
    shared = jax.tree.map(lambda x: x + 0.1, model.init(jax.random.key(0)))
    return model, unwrap(with_frozen(shared, model.frozen))


def logits_of_text(shared, pieces):
    """[T, words]: of the piece after each, in one pass over one text."""
    from jaxfed.models.lora import make_lora_product

    module = Decoder(DECODER.sizes, dot_general_cls=make_lora_product(LoraSettings(2, 4.0, "q_proj|v_proj")))
    variables = {"params": DECODER.params, "lora": shared["params"]["lora"]}
    return module.apply(variables, np.array([pieces]), np.ones((1, len(pieces)), bool))[0][0]


def text_of(items):
    return [int(piece) for item in items for piece in PIECES[item] if piece < WORDS]


def test_the_loss_is_that_of_the_whole_text(adapted):
    """However the pieces lie, without padding; to the order of float32 sums."""
    model, shared = adapted
    got = model.loss(shared, (), {"sequence": jnp.array([*READ, N, N + 7])})
    pieces = text_of(READ)
    found = jax.nn.log_softmax(logits_of_text(shared, [CONFIG["bos_token_id"], *pieces[:-1]]))
    want = -sum(row[piece] for row, piece in zip(found, pieces, strict=True))
    assert got.weight == len(READ)  # as a client's examples count
    assert got.value == pytest.approx(float(want) / len(pieces), rel=1e-5)


def test_scores_are_likelihoods_after_the_latest_items(adapted):
    """Each item's text read behind the history in one pass; an empty text is last."""
    model, shared = adapted
    shared = shared | {"text": shared["text"] | {"pieces": jnp.array(PIECES).at[5].set(WORDS)}}
    rows = jnp.array([*READ, 1 << 30, 1 << 30])
    private = model.fold_in(shared, History(rows, rows, N))
    got = model.score(shared, private, 0)
    before = [CONFIG["bos_token_id"], *text_of(READ[1:])]  # the model reads four items
    for item in (0, 3, 12, 29):
        own = text_of([item])
        found = jax.nn.log_softmax(logits_of_text(shared, [*before, *own]))[len(before) - 1 : -1]
        want = np.mean([row[piece] for row, piece in zip(found, own, strict=True)])
        assert got[item] == pytest.approx(float(want), abs=1e-5)
    assert got.argmin() == 5


def test_a_user_without_a_history_is_scored(adapted):
    model, shared = adapted
    rows = jnp.full(3, 1 << 30)
    got = model.score(shared, model.fold_in(shared, History(rows, rows, N)), 0)
    found = jax.nn.log_softmax(logits_of_text(shared, [CONFIG["bos_token_id"], *text_of([3])]))
    want = np.mean([row[piece] for row, piece in zip(found, text_of([3]), strict=False)])
    assert got[3] == pytest.approx(float(want), abs=1e-5)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: decoder_lora(N, DECODER, PIECES, 20), "model.length is 20: with 4 pieces of an item, 64 positions"),
        (lambda: decoder_lora(N, DECODER, PIECES[:9], 4), "there are 9 texts for 30 items"),
        (lambda: decoder_lora(N, DECODER, PIECES, 4, LoraSettings(13, 4.0, "q_proj")), "lora_rank is 13"),
        (lambda: decoder_lora(N, DECODER, PIECES, 4, LoraSettings(2, 4.0, "query")), "is in the path of no layer"),
        (lambda: code_decoder(N, PIECES, dim=6, heads=2), "6 numbers must be that many heads of an even width"),
    ],
)
def test_what_cannot_be_is_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_codes_of_levels_are_different_pieces():
    codes = np.array([[0, 2], [1, 0], [1, 1]])
    pieces, number = number_codes(codes)
    assert number == 5
    np.testing.assert_array_equal(pieces, [[0, 4], [1, 2], [1, 3]])


# --- runs ----------------------------------------

ITEMS, USERS = 23, 12


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder with clicks, titles and a decoder in two files."""
    pytest.importorskip("safetensors", reason="the extra `text` is not installed")
    pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    monkeypatch.setenv("JAXFED_DATA", str(tmp_path / "cache"))
    write_decoder(tmp_path / "model", files=2)
    rng = np.random.default_rng(0)
    clicks = [(u, i) for u in range(USERS) for i in rng.choice(ITEMS, rng.integers(4, 12), replace=False)]
    lines = [f"{u},{i},{t}" for t, (u, i) in enumerate(clicks)]
    (tmp_path / "clicks.csv").write_text("user,item,time\n" + "\n".join(lines) + "\n")
    words = ["red", "blue", "night", "day", "comedy", "war"]
    titles = [f"{i},{' '.join(rng.choice(words, rng.integers(1, 5)))}" for i in range(ITEMS)]
    (tmp_path / "titles.csv").write_text("item,title\n" + "\n".join(titles) + "\n")
    return tmp_path


def table(files, **more):
    model = {"name": "decoder_lora", "folder": str(files / "model"), "length": 3, "lora_rank": 2}
    return {
        "rounds": 6,
        "data": {"name": "csv", "path": str(files / "clicks.csv"), "titles": str(files / "titles.csv")},
        "model": model | more,
        "work": {"optimizer": {"name": "sgd", "learning_rate": 0.3}},
        "channel": [{"name": "weighted_mean"}],
        "server": {"name": "adam", "learning_rate": 0.02},
        "cohort": {"size": 12},
        "evaluation": {"every": 3},
        "run": {"out": str(files / "run")},
    }


def test_a_run_trains_and_sends_adapters_alone(files):
    done = train_run(make_config(table(files, max_pieces=8)))
    factors = 3 * (12 * 2 + 2 * 24 + 12 * 2 + 2 * 12)  # of q_proj and v_proj in three layers
    per_client = done["bytes_up_total"] / (6 * 12)
    assert 4 * factors <= per_client < 4 * factors + 8
    assert 0 <= done["test/full/hr@10"] <= 1


def test_clients_hold_the_items_of_their_histories_alone(files):
    """The loss compares with no other item, so none is drawn."""
    config = make_config(table(files, max_pieces=8))
    made = build_from_config(config, load_data(config.data))
    ids, present = made.sampler.draw(0, 0)
    cohort = pack_cohort(made.data.population, made.batching, made.shapes, ids, present, 0, 0)
    for block in cohort.blocks:
        rows = np.asarray(block.data.rows)
        assert ((rows < rows.max()).sum(-1) <= 3).all()
        assert not np.asarray(block.data.batch["negative"]).any()


def test_items_without_a_title_have_no_pieces(files):
    """So they come last, and not by the likelihood of an empty line."""
    read = read_lines(read_pretrained(str(files / "model")), np.array(["red night", "", "war"]), 4, 8)
    assert (read < WORDS).any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["decoder_lora", "code_decoder"])
def test_one_step_is_that_of_central_training(files, name, monkeypatch):
    """Clients whose texts have very different lengths, one of one item among them, weigh by items in both."""
    if name == "code_decoder":
        codes = np.stack([np.arange(ITEMS) // 5, np.arange(ITEMS) % 5], 1)

        def make(num_items, num_users):
            return code_decoder(num_items, codes, length=3, dim=8, heads=2)

        monkeypatch.setitem(REGISTRY["model"], "codes of tests", make)
        model = {"name": "codes of tests"}
    else:
        model = table(files, max_pieces=8)["model"]
    config = table(files) | {"model": model, "server": {"name": "sgd", "lazy": False}}
    config |= {"work": {"name": "gradient"}, "cohort": {"name": "everyone"}}
    moved = []
    for each in (config, with_central(config)):
        made = build_from_config(make_config(each), load_data(make_config(each).data))
        state = initial_arrays(made, 0)["state"]
        begin = jax.device_get(state.shared.params)
        state, _ = made.algorithm.step(state, prepare_round(made, 0, 0).cohort, make_run_keys(0).rounds)
        moved.append(jax.tree.map(np.subtract, jax.device_get(state.shared.params), begin))
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[0])) > 1e-3
    close(*moved, atol=1e-6)


def test_a_folder_must_be_named(files):
    config = make_config(table(files, folder=""))
    with pytest.raises(ValueError, match="model.folder: name a folder with a decoder of the Llama family"):
        build_from_config(config, load_data(config.data))


def test_training_makes_the_texts_of_histories_likelier(adapted):
    model, shared = adapted
    batch, frozen = {"sequence": jnp.array(READ)}, {"text": shared["text"]}
    params = {"params": shared["params"]}

    @jax.jit
    def step(params):
        value, slope = jax.value_and_grad(lambda p: model.loss({**p, **frozen}, (), batch).total)(params)
        return value, optax.apply_updates(params, jax.tree.map(lambda x: -0.02 * x, slope))

    values = []
    for _ in range(10):
        value, params = step(params)
        values.append(float(value))
    assert values[-1] < values[0] - 0.5


# --- codes under a trie ----------------------------------------


@pytest.fixture(scope="module")
def searched():
    """searched(beam) -> scores of all items by a decoder of codes; the last row is no item."""
    codes = np.unique(np.random.default_rng(4).integers(0, 4, (40, 3)), axis=0)
    codes = np.concatenate([codes, np.full((1, 3), -1)])
    rows = jnp.array([4, 20, 9, 1 << 30])

    def score(beam):
        model = code_decoder(len(codes), codes, length=3, dim=8, heads=2, beam=beam)
        shared = jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(1), x.shape), model.init(KEY))
        shared = unwrap(with_frozen(shared, model.frozen))
        return np.asarray(model.score(shared, model.fold_in(shared, History(rows, rows, len(codes))), 0))

    return score


def test_a_beam_as_wide_as_the_catalogue_scores_each_item(searched):
    """Read piece by piece against all at once; what is no item is last."""
    every, found = searched(0), searched(len(searched(0)))
    np.testing.assert_allclose(found[:-1], every[:-1], atol=1e-5)
    assert np.std(every[:-1]) > 0.1
    assert found[-1] == every[-1] == MASKED_LOGIT


def test_a_narrow_beam_finds_items_alone_and_scores_them_alike(searched):
    every, found = searched(0), searched(5)
    seen = found > MASKED_LOGIT
    assert seen.sum() == 5
    np.testing.assert_allclose(found[seen], every[seen], atol=1e-5)


def test_a_trie_has_the_prefixes_of_the_codes():
    levels = build_trie(np.array([[0, 2], [0, 3], [1, 3], [9, 9]]), 4)
    np.testing.assert_array_equal(levels[0].children, [[0, 1, -1, -1]])
    np.testing.assert_array_equal(levels[1].children, [[-1, -1, 0, 1], [-1, -1, -1, 2]])
