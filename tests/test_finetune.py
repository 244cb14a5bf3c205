"""Fine-tuning on a share of the labels, and distillation."""

import copy

import pytest
import torch

from fastcl import models
from fastcl.data import TensorSplit
from fastcl.evaluate import unit_range
from fastcl.finetune import PROTOCOLS, Protocol, accuracy, crop_and_flip, distil, finetune, share

FAST = {"protocol": Protocol(lr=0.5, batch_size=16), "epochs": 6, "normalize": unit_range}


@pytest.fixture
def stripes():
    """Images with horizontal or vertical stripes."""
    torch.manual_seed(0)
    images = torch.randint(0, 100, (96, 3, 16, 16), dtype=torch.uint8)
    labels = torch.arange(96) % 2
    images[labels == 0, :, ::4] += 150
    images[labels == 1, :, :, ::4] += 150
    return TensorSplit(images, labels)


def test_share_takes_as_many_of_each_class():
    labels = torch.tensor([0] * 200 + [1] * 100 + [2] * 10)
    rows = share(labels, 0.1)
    assert labels[rows].bincount().tolist() == [20, 10, 1]
    assert len(rows.unique()) == 31 and torch.equal(rows, share(labels, 0.1))
    assert not torch.equal(rows, share(labels, 0.1, seed=1))
    assert torch.equal(share(labels, 1.0), torch.arange(310))
    assert labels[share(labels, 0.001)].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="fraction of the labels"):
        share(labels, 0.0)


def test_crops_are_parts_of_the_image():
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(200, 1, 8, 8)
    views = crop_and_flip(images, torch.Generator().manual_seed(0))
    assert views.min() >= 0 and views.max() <= 63
    rising = views[:, 0, 0, -1] > views[:, 0, 0, 0]
    assert 0.35 < rising.float().mean() < 0.65  # half are flipped
    assert (views[:, 0, -1, 0] > views[:, 0, 0, 0]).all()  # never upside down


def test_every_weight_learns_and_the_student_follows_the_teacher(stripes):
    body = models.build("tiny-resnet", image_size=16)
    before = copy.deepcopy(body)
    teacher = finetune(body, 128, stripes.images, stripes.labels, 2, crop=0.5, **FAST)
    assert accuracy(teacher, stripes, unit_range) > 0.9
    for old, new in zip(before.parameters(), body.parameters(), strict=True):
        assert not torch.equal(old, new)
    student = torch.nn.Sequential(
        models.build("tiny-resnet", image_size=16), torch.nn.Linear(128, 2)
    )
    frozen = copy.deepcopy(teacher.state_dict())
    distil(student, teacher, stripes.images, temperature=1.0, crop=0.5, **FAST)
    assert accuracy(student, stripes, unit_range) > 0.9
    assert all(torch.equal(frozen[k], v) for k, v in teacher.state_dict().items())


def test_learning_rates_are_the_papers():
    assert PROTOCOLS["simclr"].peak(4096) == pytest.approx(0.8)
    assert PROTOCOLS["simclr-v2"].peak(1024) == pytest.approx(0.16)
    assert (PROTOCOLS["simclr-v2"].few_epochs, PROTOCOLS["simclr-v2"].epochs) == (60, 30)
