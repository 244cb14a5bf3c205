"""The loader: every image once an epoch, and exactly the same batches after a restart."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fastcl.data import FolderSplit, Loader, TensorSplit, augment

N = 53


@pytest.fixture(scope="module")
def recipe():
    return augment.build("moco-v2", image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)


@pytest.fixture(scope="module")
def memory():
    images = torch.randint(0, 256, (N, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return TensorSplit(images.to(torch.uint8), torch.arange(N) % 7)


@pytest.fixture(scope="module")
def files(memory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for index, image in enumerate(memory.images):
        paths.append(str(folder / f"{index:03}.png"))
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(paths[-1])
    return FolderSplit(tuple(paths), memory.labels, 16)


@pytest.fixture(params=["memory", "files"])
def split(request):
    return request.getfixturevalue(request.param)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip([*a[0], *a[1:]], [*b[0], *b[1:]]))


def test_an_epoch_has_every_image_once_with_its_label(split, recipe):
    loader = Loader(split, recipe, batch_size=10, drop_last=False, workers=0)
    batches = list(loader)
    assert len(batches) == len(loader) == 6 and len(batches[-1][2]) == 3
    indices = torch.cat([batch[2] for batch in batches])
    assert sorted(indices.tolist()) == list(range(N))
    assert indices.tolist() != list(range(N))
    for views, labels, index in batches:
        assert torch.equal(labels, split.labels[index])
        assert [view.shape for view in views] == [(len(index), 3, 16, 16)] * 2
    dropped = Loader(split, recipe, batch_size=10, workers=0)
    assert len(list(dropped)) == len(dropped) == 5


def test_epochs_differ_and_seeds_repeat(split, recipe):
    one, two = (Loader(split, recipe, batch_size=25, seed=3, workers=0) for _ in range(2))
    first, second = list(one), list(one)
    assert (one.epoch, one.batch) == (2, 0)
    assert not torch.equal(first[0][2], second[0][2])
    assert all(equal(a, b) for a, b in zip(first + second, [*two, *two]))
    other = Loader(split, recipe, batch_size=25, seed=4, workers=0)
    assert not torch.equal(next(iter(other))[2], first[0][2])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_batch(split, recipe, workers):
    alone = Loader(split, recipe, batch_size=9, workers=0)
    helped = Loader(split, recipe, batch_size=9, workers=workers)
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_restart_goes_on_exactly(split, recipe, stop):
    """Batch 5 of 5 ends an epoch: the position is saved while the last batch is in use."""
    workers = 1 if isinstance(split, TensorSplit) else 0
    loader = Loader(split, recipe, batch_size=10, seed=1, workers=workers)
    batches, states = [], []
    for _ in range(3):
        for batch in loader:
            batches.append(batch)
            states.append(loader.state_dict())
    restarted = Loader(split, recipe, batch_size=10, seed=99, workers=0)
    torch.rand(3)
    restarted.load_state_dict(states[stop - 1])
    rest = [*restarted, *restarted]  # the rest of one epoch and all of the next
    assert len(rest) == {1: 9, 3: 7, 5: 10, 7: 8}[stop]
    assert all(equal(a, b) for a, b in zip(batches[stop:], rest))


def test_breaking_off_keeps_the_position(memory, recipe):
    loader = Loader(memory, recipe, batch_size=10, workers=1)
    whole = list(Loader(memory, recipe, batch_size=10, workers=1))
    for _ in loader:
        if loader.batch == 2:
            break
    assert all(equal(a, b) for a, b in zip(whole[2:], loader, strict=True))
    assert (loader.epoch, loader.batch) == (1, 0)


def test_the_global_generator_and_threads_are_left_alone(split, recipe):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    list(Loader(split, recipe, batch_size=10, workers=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_an_error_in_a_worker_reaches_the_caller(memory):
    class Broken:
        def views(self, images, generator):
            raise RuntimeError("out of colours")

    with pytest.raises(RuntimeError, match="out of colours"):
        list(Loader(memory, Broken(), batch_size=10, workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_replaced_and_reported(files, recipe, tmp_path, workers):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(files.paths[0]).read_bytes()[:40])
    split = FolderSplit((files.paths[0], str(broken), *files.paths[2:12]), files.labels[:12], 16)
    loader = Loader(split, recipe, batch_size=4, workers=workers)
    with pytest.warns(UserWarning, match=r"unreadable image: .*broken\.png") as warned:
        indices = torch.cat([batch[2] for batch in loader])
    said = [w for w in warned if w.category is not DeprecationWarning]  # Python 3.12's, of fork()
    assert len(said) == 1 and list(split.unreadable) == [str(broken)]
    assert sorted(indices.tolist()) == [0, 2, 2, *range(3, 12)]
    list(loader)  # the second epoch does not warn again


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 54}, "batch_size 54 is more than the 53 images"),
        ({"batch_size": 5, "workers": -1}, "workers must not be negative; got -1"),
    ],
)
def test_bad_arguments(memory, recipe, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(memory, recipe, **options)


def test_processes_share_each_batch_of_one_process_out(split, recipe):
    whole = Loader(split, recipe, batch_size=7, seed=3, workers=0)
    shares = [
        Loader(split, recipe, batch_size=7, seed=3, workers=0, rank=rank, world=3)
        for rank in range(3)
    ]
    for (_, _, indices), *parts in zip(whole, *shares, strict=True):
        for rank, (views, labels, own) in enumerate(parts):
            assert torch.equal(own, indices[rank::3])
            assert len(views[0]) == len(labels) == len(own)
    with pytest.raises(ValueError, match="less than the 8 processes"):
        Loader(split, recipe, batch_size=7, world=8)
