"""fastcl.compat.pytorch_metric_learning against pytorch-metric-learning."""
# ruff: noqa: B023 (what a step calls, it calls at once)

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastcl.compat import FallbackWarning, patch
from fastcl.compat import pytorch_metric_learning as ours

pytest.importorskip("pytorch_metric_learning")
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
NAMES = ["NTXentLoss", "SupConLoss"]
# What is drawn: labels of a batch (N,) for a few regimes.
LABELS = {
    "few": [0, 1, 0, 2, 1, 0, 0, 2, 2, 1, 0, 1],
    "pairs": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5],
    "pairs-and-more": [0, 0, 1, 1, 2, 2, 2, 7, 9, 3, 3, 3],
    "lonely": [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10],
    "none": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
    "one-class": [3] * 12,
    "negative-numbers": [-5, -5, 2**40, 2**40, 0, 0, 1, 1, 1, 1, -5, 8],
}


def both(name, *args, **kwargs):
    return getattr(losses, name)(*args, **kwargs), getattr(ours, name)(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", LABELS)
@pytest.mark.parametrize("name", NAMES)
def test_labels(compare, draw, name, regime, dtype):
    labels = torch.tensor(LABELS[regime])
    for temperature in (0.3, 1.0, 5.0):
        pair = compare(*both(name, temperature), dtype)
        pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_random_labels_and_references(compare, draw, name, dtype):
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        n, m = (int(torch.randint(1, 20, (), generator=generator)) for _ in range(2))
        classes = int(torch.randint(1, 9, (), generator=generator))
        labels, refs = (torch.randint(classes, (k,), generator=generator) for k in (n, m))
        pair = compare(*both(name, 0.5), dtype)
        inputs = (draw(n, 5), draw(m, 5))
        pair.step(lambda loss, x, y: loss(x, labels, None, y, refs), inputs)
        pair.step(lambda loss, x: loss(x, labels), inputs[:1])
        pair.step(
            lambda loss, x, y: loss(x, labels, ref_emb=y, ref_labels=refs),
            inputs,
            needs=(True, False),
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_same_embeddings_or_labels_as_reference(compare, draw, name):
    """The library leaves a row's own column out only when both labels are one object."""
    labels = torch.tensor(LABELS["few"])
    pair = compare(*both(name, 0.5), torch.float64)
    pair.step(lambda loss, x: loss(x, labels, ref_emb=x, ref_labels=labels), (draw(12, 7),))
    pair.step(lambda loss, x: loss(x, labels, ref_emb=x, ref_labels=labels.clone()), (draw(12, 7),))
    inputs = (draw(12, 7), draw(12, 7))
    pair.step(lambda loss, x, y: loss(x, labels, ref_emb=y, ref_labels=labels), inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "distance",
    [distances.CosineSimilarity(), distances.DotProductSimilarity(),
     distances.DotProductSimilarity(normalize_embeddings=False)],
    ids=["cosine", "dot", "dot-raw"],
)  # fmt: skip
def test_distances(compare, draw, name, distance):
    labels = torch.tensor(LABELS["few"])
    pair = compare(*both(name, 2.0, distance=distance), torch.float32)
    pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))
    pair.step(lambda loss, x, y: loss(x, labels, None, y, labels[:9]), (draw(12, 7), draw(9, 7)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"distance": distances.LpDistance()},
        {"distance": distances.CosineSimilarity(power=2)},
        {"distance": distances.SNRDistance()},
        {"distance": distances.CosineSimilarity(collect_stats=True)},
    ],
    ids=["lp", "power", "snr", "stats"],
)
def test_other_distances_run_the_librarys_code(compare, draw, name, options):
    labels = torch.tensor(LABELS["few"])
    pair = compare(*both(name, 2.0, **options), torch.float64, fused=False)
    with pytest.warns(FallbackWarning, match=f"{name} runs the library's own code"):
        pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "reducer",
    [
        reducers.MeanReducer(),
        reducers.AvgNonZeroReducer(),
        reducers.ThresholdReducer(low=0.5, high=3),
        reducers.PerAnchorReducer(reducers.AvgNonZeroReducer()),
        reducers.ClassWeightedReducer(torch.linspace(0.5, 2, 11)),
        reducers.SumReducer(),
    ],
    ids=lambda r: type(r).__name__,
)
def test_reducers_and_regularizers(compare, draw, name, reducer):
    labels = torch.tensor(LABELS["pairs-and-more"])
    pair = compare(*both(name, 0.5, reducer=reducer), torch.float64)
    pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))
    options = {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3}
    pair = compare(*both(name, 0.5, reducer=reducer, **options), torch.float64)
    pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))


@pytest.mark.parametrize("name", NAMES)
def test_do_nothing_reducer_gives_the_librarys_dictionary(draw, name):
    labels, x = torch.tensor(LABELS["few"]), draw(12, 7)
    expected, result = (
        f(x, labels)["loss"] for f in both(name, reducer=reducers.DoNothingReducer())
    )
    assert result.pop("reduction_type") == expected.pop("reduction_type")
    torch.testing.assert_close(result, expected)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("name", NAMES)
def test_miners_run_the_librarys_code(compare, draw, name):
    labels = torch.tensor(LABELS["few"])
    for miner in (miners.MultiSimilarityMiner(), miners.TripletMarginMiner()):
        pair = compare(*both(name, 0.5), torch.float64, fused=False)
        pair.step(lambda loss, x: loss(x, labels, miner(x, labels)), (draw(12, 7),))
        pair.step(lambda loss, x: loss(x, indices_tuple=miner(x, labels)), (draw(12, 7),))


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_pairs_in_half_precision_have_one_loss_whoever_gives_them(draw, name, dtype):
    labels = torch.tensor(LABELS["few"])
    for scale in (0.1, 1, 10, 100):
        x, loss = (scale * draw(12, 7)).to(dtype), getattr(ours, name)(0.07)
        pairs = get_all_pairs_indices(labels)
        expected, result = loss(x, labels, pairs), loss(x, labels)
        assert result.dtype == expected.dtype == getattr(losses, name)(0.07)(x, labels).dtype
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_dtype_under_autocast(draw, name):
    labels, x = torch.tensor(LABELS["few"]), draw(12, 7).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, result = (f(x, labels) for f in both(name, 0.5))
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_supcon_leaves_out_rows_whose_loss_vanishes(compare, draw, dtype):
    """Its AvgNonZeroReducer: saturated pairs do not count in the mean."""
    labels = torch.arange(8).repeat(2)
    x = torch.eye(16, dtype=torch.float64)[:8] * 3
    noise = 0.5 * draw(4, 16)
    z = torch.cat((x, x[:4], x[4:] + noise))  # 4 perfect pairs, 4 that are not
    pair = compare(*both("SupConLoss", 0.03), dtype)
    pair.step(lambda loss, x: loss(x, labels), (z,))
    perfect = ours.SupConLoss(0.03)(torch.cat((x, x)).to(dtype), labels)
    assert perfect == losses.SupConLoss(0.03)(torch.cat((x, x)).to(dtype), labels) == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_self_supervised_loss(compare, draw, name, symmetric):
    pair = compare(
        *(losses.SelfSupervisedLoss(f, symmetric) for f in both(name, 0.5)), torch.float32
    )
    pair.step(lambda loss, x, y: loss(x, y), (draw(33, 9), draw(33, 9)))


@pytest.mark.filterwarnings("ignore:DistributedLossWrapper")
@pytest.mark.parametrize("name", NAMES)
def test_distributed_loss_wrapper_of_one_process(compare, draw, name):
    labels = torch.tensor(LABELS["few"])
    for efficient in (True, False):
        pair = compare(*(DistributedLossWrapper(f, efficient) for f in both(name)), torch.float32)
        pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))
    DistributedLossWrapper(ours.CrossBatchMemory(both(name)[1], 7, 40))  # its isinstance


# ---- CrossBatchMemory ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n, size", [(1, 7), (4, 12), (5, 12), (8, 8), (7, 10), (16, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory_over_steps(compare, draw, name, n, size, dtype):
    """Also one row, which finds itself; a batch as large as the memory; the wrap."""
    modules = [
        m.CrossBatchMemory(f, 6, size).to(dtype) for m, f in zip((losses, ours), both(name, 0.5))
    ]
    pair = compare(*modules, dtype)
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        labels = torch.randint(2 + step % 3, (n,), generator=generator)
        pair.step(lambda loss, x: loss(x, labels), (draw(n, 6),))
        assert pair.ours.queue_idx == pair.theirs.queue_idx
        assert pair.ours.has_been_filled == pair.theirs.has_been_filled
    assert list(pair.ours.state_dict()) == ["embedding_memory", "label_memory"]


@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory_with_an_enqueue_mask(compare, draw, name):
    pair = compare(
        *(m.CrossBatchMemory(f, 6, 20) for m, f in zip((losses, ours), both(name, 0.5))),
        torch.float64,
    )
    mask = torch.tensor([True, False] * 5)
    labels = torch.tensor(LABELS["few"][:10])
    for _ in range(6):
        pair.step(lambda loss, x: loss(x, labels, enqueue_mask=mask), (draw(10, 6),))


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("name", NAMES)
def test_cross_batch_memory_with_a_miner_or_pairs(compare, draw, name):
    labels = torch.tensor(LABELS["few"])
    for miner in (None, miners.MultiSimilarityMiner(), miners.TripletMarginMiner()):
        modules = [
            m.CrossBatchMemory(f, 7, 30, copy.deepcopy(miner))
            for m, f in zip((losses, ours), both(name, 0.5))
        ]
        pair = compare(*modules, torch.float64, fused=False)
        for _ in range(4):
            given = miners.MultiSimilarityMiner()
            pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))
            if name == "SupConLoss":  # the library refuses pairs that are both kinds
                continue
            pair.step(lambda loss, x: loss(x, labels, given(x, labels)), (draw(12, 7),))


def test_cross_batch_memory_gives_others_the_librarys_indices(draw):
    labels = torch.tensor(LABELS["few"])
    tuples = []
    for m in (losses, ours):
        memory = m.CrossBatchMemory(m.NTXentLoss(), 7, 30)
        memory(draw(12, 7).float(), labels)
        tuples.append(
            memory.create_indices_tuple(
                draw(12, 7), labels, memory.embedding_memory, memory.label_memory, None,
                do_remove_self_comparisons=True,
            )
        )  # fmt: skip
    torch.testing.assert_close(*tuples)


def test_cross_batch_memory_around_other_losses(compare, draw):
    labels = torch.tensor(LABELS["few"])
    modules = [m.CrossBatchMemory(losses.ContrastiveLoss(), 7, 30) for m in (losses, ours)]
    pair = compare(*modules, torch.float64)
    for _ in range(4):
        pair.step(lambda loss, x: loss(x, labels), (draw(12, 7),))


# ---- the interface -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("name", NAMES)
def test_errors_are_the_librarys(name):
    x = torch.randn(4, 3)
    cases = [
        ((x,), ValueError),
        ((x, torch.zeros(3)), ValueError),
        ((x, torch.zeros(4, 1)), ValueError),
        ((x[0], torch.zeros(3)), ValueError),
        ((x, torch.tensor([0, 0, 1, 1]), None, torch.randn(4, 5), torch.arange(4)), RuntimeError),
    ]
    for arguments, kind in cases:
        errors = []
        for loss in both(name):
            with pytest.raises(kind) as caught:
                loss(*arguments)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]
    with pytest.raises(Exception, match="CrossBatchMemory not supported for ArcFaceLoss"):
        ours.CrossBatchMemory(losses.ArcFaceLoss(3, 4), 4)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("name", NAMES)
def test_labels_that_are_not_integers(compare, draw, name):
    labels = torch.tensor(LABELS["few"])
    pair = compare(*both(name), torch.float64, fused=False)
    pair.step(lambda loss, x: loss(x, labels.float()), (draw(12, 7),))
    pair.step(lambda loss, x: loss(x, labels > 0), (draw(12, 7),))


@pytest.mark.parametrize("name", NAMES)
def test_labels_in_16_bits(compare, draw, name):
    labels = torch.tensor(LABELS["few"])
    pair = compare(*both(name), torch.float64)
    pair.step(lambda loss, x: loss(x, labels.to(torch.int16)), (draw(12, 7),))


def test_subclasses_names_and_pickle(draw):
    for name in ("NTXentLoss", "SupConLoss", "CrossBatchMemory"):
        cls = getattr(ours, name)
        assert issubclass(cls, getattr(losses, name)) and cls.__name__ == name
        assert cls.__module__ == "fastcl.compat.pytorch_metric_learning"
    loss = pickle.loads(pickle.dumps(ours.CrossBatchMemory(ours.NTXentLoss(), 7, 30)))
    assert type(loss.loss) is ours.NTXentLoss
    with pytest.raises(AttributeError):
        ours.TripletLoss  # noqa: B018


def test_under_patch(draw):
    with patch("pytorch_metric_learning"):
        assert losses.NTXentLoss is ours.NTXentLoss
        loss = losses.CrossBatchMemory(losses.SupConLoss(), 7, 30)
        assert type(loss) is ours.CrossBatchMemory
        DistributedLossWrapper(loss)
    assert losses.NTXentLoss is not ours.NTXentLoss


@pytest.mark.parametrize("name", NAMES)
def test_no_matrix_is_made(largest, name):
    x, y = torch.randn(64, 4).requires_grad_(), torch.randn(64, 4)  # its NTXentLoss is cubic
    expected, result = (largest(lambda: losses.SelfSupervisedLoss(f)(x, y)) for f in both(name))
    assert expected >= 128 * 128 and result <= 4 * 128 * 4
    memories = [m.CrossBatchMemory(f, 4, 512) for m, f in zip((losses, ours), both(name))]
    labels = torch.arange(64) // 2
    expected, result = (largest(lambda: memory(x, labels)) for memory in memories)
    assert expected >= 64 * 64 and result <= 4 * 512
