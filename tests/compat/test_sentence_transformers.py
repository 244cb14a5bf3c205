"""fastcl.compat.sentence_transformers against sentence-transformers."""
# ruff: noqa: B023 (what a step calls, it calls at once)

from __future__ import annotations

import copy
import itertools
import pickle
import sys

import pytest
import torch
from torch import nn

from fastcl.compat import FallbackWarning, patch
from fastcl.compat import sentence_transformers as ours

pytest.importorskip("sentence_transformers")
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score, euclidean_sim

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
EXTRA = ("query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [
    ("query_to_doc", *chosen) for k in range(4) for chosen in itertools.combinations(EXTRA, k)
]
HARDNESS = [
    (None, 0.0),
    ("in_batch_negatives", 3.0),
    ("hard_negatives", 2.0),
    ("all_negatives", 0.7),
]
NAMES = ["MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"]


class Encoder(nn.Module):
    """The mean of the tokens' embeddings."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, features, **kwargs):
        mask = features["attention_mask"][..., None].to(self.head.weight.dtype)
        mean = (self.tokens(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": self.head(mean)}

    def get_embedding_dimension(self):
        return 6


def model():
    return SentenceTransformer(modules=[Encoder()], device="cpu")


MODEL = model()


def both(name, **options):
    return [getattr(m, name)(copy.deepcopy(MODEL), **options) for m in (losses, ours)]


def of_embeddings(loss, *columns):
    """The loss of columns of embeddings (N, D), whichever class it is."""
    if hasattr(loss, "compute_loss_from_embeddings"):
        return loss.compute_loss_from_embeddings(list(columns), None)
    halves = [[x[: len(x) // 2], x[len(x) // 2 :]] for x in columns]
    return loss.calculate_loss(halves, None)


@pytest.mark.parametrize("hardness", HARDNESS, ids=lambda h: str(h[0]))
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
@pytest.mark.parametrize("name", NAMES)
def test_options(compare, draw, name, directions, hardness):
    """Every set of directions, partition and hardness, with 0 to 2 hard negatives, two sizes."""
    options = {
        "directions": directions,
        "hardness_mode": hardness[0],
        "hardness_strength": hardness[1],
    }
    partitions = ["joint"]
    if not {"query_to_query", "doc_to_doc"} & set(directions):
        partitions.append("per_direction")
    for partition, negatives, n in itertools.product(partitions, range(3), (2, 9)):
        pair = compare(*both(name, **options, partition_mode=partition), torch.float64)
        pair.step(of_embeddings, [draw(n, 5) for _ in range(2 + negatives)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("similarity", [cos_sim, dot_score], ids=["cos", "dot"])
@pytest.mark.parametrize("scale", [1.0, 20.0, 100.0])
@pytest.mark.parametrize("name", NAMES)
def test_dtypes_similarities_and_scales(compare, draw, name, scale, similarity, dtype):
    options = {"scale": scale, "similarity_fct": similarity}
    size = 0.3 if similarity is dot_score else 2.0
    for n, d in ((1, 3), (33, 8)):
        if name.startswith("Cached") and n == 1:
            continue
        pair = compare(*both(name, **options), dtype)
        pair.step(of_embeddings, [size * draw(n, d) for _ in range(3)])
        symmetric = {
            "directions": ("query_to_doc", "doc_to_query"),
            "partition_mode": "per_direction",
        }
        pair = compare(*both(name, **options, **symmetric), dtype)
        pair.step(of_embeddings, [size * draw(n, d) for _ in range(2)])


@pytest.mark.parametrize("hardness", HARDNESS, ids=lambda h: str(h[0]))
@pytest.mark.parametrize("directions", DIRECTIONS, ids="+".join)
@pytest.mark.parametrize("name", NAMES)
def test_gather_across_devices(compare, draw, monkeypatch, name, directions, hardness):
    """As rank 1 of 3, the others' rows put beside ours by the library's functions."""
    n, others = 6, [draw(6, 5) for _ in range(2)]

    def gather(x):
        return torch.cat((others[0].to(x), x, others[1].to(x)))

    for kind in ("multiple", "cached_multiple"):
        module = sys.modules[f"{losses.__name__}.{kind}_negatives_ranking"]
        monkeypatch.setattr(module, "all_gather_with_grad", gather)
        monkeypatch.setattr(module, "get_rank", lambda: 1)
    options = {
        "directions": directions,
        "hardness_mode": hardness[0],
        "hardness_strength": hardness[1],
    }
    for columns in (2, 3):
        pair = compare(*both(name, **options, gather_across_devices=True), torch.float64)
        pair.step(of_embeddings, [draw(n, 5) for _ in range(columns)])


def test_gather_of_one_process(compare, draw):
    pair = compare(*both(NAMES[0], gather_across_devices=True), torch.float64)
    pair.step(of_embeddings, [draw(5, 4), draw(5, 4)])


@pytest.mark.parametrize("name", NAMES)
def test_dtype_under_autocast(draw, name):
    columns = [draw(8, 6).float() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = (of_embeddings(f, *columns) for f in both(name))
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=0)


def batches(columns, n, seed):
    generator = torch.Generator().manual_seed(seed)
    features = []
    for _ in range(columns):
        ids = torch.randint(50, (n, 4), generator=generator)
        features.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return features


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_training_steps(name, columns):
    """Through a model: the same weights after some steps, also with cached gradients."""
    options = {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}
    if name.startswith("Cached"):
        options["mini_batch_size"] = 5
    torch.manual_seed(0)
    theirs, mine = both(name, **options)
    for loss in (theirs.double(), mine.double()):
        optimizer = torch.optim.SGD(loss.model.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            loss([dict(f) for f in batches(columns, 13, step)], None).backward()
            optimizer.step()
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert list(mine.state_dict()) == list(theirs.state_dict())
    with torch.no_grad():
        values = [loss([dict(f) for f in batches(columns, 13, 9)], None) for loss in (theirs, mine)]
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", NAMES)
def test_configuration_is_the_librarys(name):
    theirs, mine = both(name, scale=7.0, hardness_mode="hard_negatives", hardness_strength=2.0)
    assert mine.get_config_dict() == theirs.get_config_dict()
    assert mine.temperature == theirs.temperature and mine.citation == theirs.citation
    mine.scale = theirs.scale = 3.0
    columns = [torch.randn(4, 5) for _ in range(3)]
    torch.testing.assert_close(of_embeddings(mine, *columns), of_embeddings(theirs, *columns))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"scale": 0.0},
        {"directions": ()},
        {"directions": ("doc_to_query",)},
        {"directions": ("query_to_doc", "sideways")},
        {"partition_mode": "both"},
        {"directions": ("query_to_doc", "doc_to_doc"), "partition_mode": "per_direction"},
        {"hardness_mode": "soft"},
        {"hardness_mode": "hard_negatives", "hardness_strength": -1.0},
    ],
)
def test_wrong_arguments(name, options):
    for module in (losses, ours):
        with pytest.raises(ValueError):
            getattr(module, name)(model(), **options)
    for loss in both(name):
        with pytest.raises(ValueError, match="Expected at least 2"):
            loss(batches(1, 3, 0), None)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("name", NAMES)
def test_other_similarities_run_the_librarys_code(compare, draw, name):
    pair = compare(*both(name, similarity_fct=euclidean_sim), torch.float64, fused=False)
    with pytest.warns(FallbackWarning, match="its similarity is euclidean_sim"):
        pair.step(of_embeddings, [draw(5, 4), draw(5, 4), draw(5, 4)])
    # More documents than queries, which only the first direction allows.
    pair = compare(*both("MultipleNegativesRankingLoss"), torch.float64, fused=False)
    pair.step(of_embeddings, [draw(5, 4), draw(5, 4), draw(9, 4)])


def test_names_pickle_and_patch():
    for name in NAMES:
        cls = getattr(ours, name)
        assert issubclass(cls, getattr(losses, name)) and cls.__name__ == name
    loss = pickle.loads(pickle.dumps(ours.MultipleNegativesRankingLoss(model())))
    assert type(loss) is ours.MultipleNegativesRankingLoss
    with patch("sentence_transformers"):
        import sentence_transformers.losses

        assert losses.MultipleNegativesRankingLoss is ours.MultipleNegativesRankingLoss
        old = sentence_transformers.losses
        assert old.MultipleNegativesRankingLoss is ours.MultipleNegativesRankingLoss
        inner = losses.MatryoshkaLoss(
            Encoder(), losses.MultipleNegativesRankingLoss(model()), [6, 3]
        )
        assert type(inner.loss) is ours.MultipleNegativesRankingLoss


@pytest.mark.parametrize("name", NAMES)
def test_in_matryoshka_loss(name):
    """A wrapper that cuts the embeddings and calls the loss again."""
    torch.manual_seed(0)
    theirs, mine = both(name)
    values = []
    for loss in (theirs, mine):
        loss.double()
        whole = losses.MatryoshkaLoss(loss.model, loss, [6, 3])
        value = whole([dict(f) for f in batches(3, 7, 0)], None)
        value.backward()
        values.append([value, *(p.grad for p in loss.model.parameters())])
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_is_made(largest, name):
    columns = [torch.randn(512, 4).requires_grad_() for _ in range(3)]
    options = {"directions": ("query_to_doc", *EXTRA)}
    expected, result = (largest(lambda: of_embeddings(f, *columns)) for f in both(name, **options))
    assert expected >= 32 * 1024 and result <= 4 * 1024 * 4
