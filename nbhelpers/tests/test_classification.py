"""Classifiers: data in memory, batches by seed, downloads, training that learns, repeats and refuses nonsense."""

from __future__ import annotations

import gzip
import hashlib

import pytest
import torch
from torch import nn

from nbhelpers import runtime
from nbhelpers.classification import ClassifierTraining, evaluate_classifier, fit_classifier
from nbhelpers.datasets import classification as data
from nbhelpers.datasets.classification import DataError, LabelledPictures, ShuffledBatches, open_pictures
from nbhelpers.datasets.download import DownloadError
from nbhelpers.experiments import TrainingError

from .test_download import server  # noqa: F401 - a fixture

FAST = ClassifierTraining(epochs=3, batch=16, precision="fp32", device="cpu")


def stripes(n: int) -> LabelledPictures:
    """Class 0 is bright on the left, class 1 on the right; the rest is noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (n, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(n) % 2
    images[labels == 0, :, :, :4] += 150
    images[labels == 1, :, :, 4:] += 150
    return LabelledPictures(images, labels, 2)


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


# --- data -------------------------------------------------------------------------------------------------


def test_bundled_digits_split_into_five_disjoint_folds():
    total = torch.zeros(10, dtype=torch.long)
    for fold in range(5):
        train, test = open_pictures("mnist10k", fold)
        assert train.images.shape == (8000, 1, 28, 28) and train.images.dtype == torch.uint8
        assert len(test) == 2000 and train.labels.dtype == torch.int64
        total += test.labels.bincount(minlength=10)
    assert total.tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]


@pytest.mark.parametrize("fold", [0, 3])
def test_no_digit_is_in_training_and_test(fold):
    pictures = LabelledPictures(torch.arange(23)[:, None, None, None], torch.zeros(23, dtype=torch.long), 1)
    train, test = data.fold_split(pictures, fold)
    assert sorted([*train.images.flatten().tolist(), *test.images.flatten().tolist()]) == list(range(23))
    assert test.images.flatten().tolist() == list(range(fold, 23, 5))


def test_missing_or_damaged_digits_say_how_to_get_them_back(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "DATA", tmp_path)
    with pytest.raises(DataError, match=r"mnist10k.npz is missing.*git checkout"):
        open_pictures("mnist10k")
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "mnist10k.npz").write_bytes(b"half a file")
    with pytest.raises(DataError, match=r"mnist10k.npz is damaged.*git checkout"):
        open_pictures("mnist10k")


def test_unknown_data_set_lists_the_known():
    with pytest.raises(DataError, match=r"'mnist100' is unknown.*mnist10k"):
        open_pictures("mnist100")


def test_batches_follow_seed_and_epoch_and_repeat_no_picture():
    def order(seed, epoch):
        batches = ShuffledBatches(21, 4, seed)
        batches.set_epoch(epoch)
        assert len(batches) == len(list(batches)) == 5
        return torch.cat(list(batches)).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(*key)) for key in [(1, 2), (1, 3), (2, 2)]}) == 3
    assert len(set(order(1, 2))) == 20 and max(order(1, 2)) <= 20


@pytest.mark.parametrize("batch", [0, 22])
def test_impossible_batch_is_refused(batch):
    with pytest.raises(DataError, match=rf"batch={batch} .* 21"):
        ShuffledBatches(21, batch, 0)


# --- all of MNIST, from a server on this machine ----------------------------------------------------------


def idx(values: torch.Tensor) -> bytes:
    head = bytes([0, 0, 8, values.dim()]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
    return gzip.compress(head + values.numpy().tobytes(), mtime=0)


@pytest.fixture
def mnist_server(server, runs, monkeypatch):  # noqa: F811 - the fixture
    """Three training and two test digits under MNIST's names, with hashes to match."""
    from torchvision.datasets import MNIST

    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (n, 28, 28), dtype=torch.uint8, generator=generator) for n in (3, 2)]
    labels = [torch.tensor(x, dtype=torch.uint8) for x in ([5, 0, 4], [7, 2])]
    contents = [idx(x) for pair in zip(images, labels, strict=True) for x in pair]
    names = [name for name, _ in MNIST.resources]
    server.files.update(zip(names, contents, strict=True))
    resources = [(n, hashlib.md5(c).hexdigest()) for n, c in zip(names, contents, strict=True)]
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [server.url])
    return server, images


def test_all_of_mnist_is_downloaded_once(mnist_server):
    server, images = mnist_server  # noqa: F811
    for _ in range(2):
        train, test = open_pictures("mnist")
        assert torch.equal(train.images[:, 0], images[0]) and torch.equal(test.images[:, 0], images[1])
        assert train.labels.tolist() == [5, 0, 4] and test.labels.tolist() == [7, 2]
    assert len(server.asked) == 4


def test_torchvision_finds_the_same_files(mnist_server):
    from torchvision.datasets import MNIST

    server, images = mnist_server  # noqa: F811
    open_pictures("mnist")
    theirs = MNIST(runtime.RUNS / "downloads" / "mnist", train=True, download=True)
    assert torch.equal(theirs.data, images[0]) and len(server.asked) == 4


def test_a_changed_file_is_not_used(mnist_server):
    server, _ = mnist_server  # noqa: F811
    server.files["t10k-labels-idx1-ubyte.gz"] = idx(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(DownloadError, match=r"t10k-labels-idx1-ubyte.gz is damaged or has changed"):
        open_pictures("mnist")


def test_without_internet_the_error_says_what_to_put_where(mnist_server):
    server, _ = mnist_server  # noqa: F811
    server.http.server_close()
    with pytest.raises(DownloadError, match=r"no connection to .*train-images-idx3-ubyte.gz.*by hand.*MNIST.raw"):
        data.mnist(base_url="http://127.0.0.1:9/")


# --- training ---------------------------------------------------------------------------------------------


def test_training_learns_and_is_decided_by_the_seed():
    pictures, test = stripes(96), stripes(40)

    def run(seed):
        return fit_classifier(small_network(), pictures, test, FAST, seed, progress=False)

    first, again, other = run(0), run(0), run(1)
    assert first.history[-1]["test_accuracy"] == 1.0
    assert first.steps == 18 and [r["step"] for r in first.history] == [6, 12, 18]
    assert first.history == again.history
    assert first.history[0]["train_loss"] != other.history[0]["train_loss"]
    assert not first.model.training


def test_every_epoch_has_an_order_of_its_own_and_the_rate_makes_one_cycle():
    seen, rates = [], []

    class Watching(nn.Sequential):
        def forward(self, x):
            if self.training:
                seen.append(tuple(x.flatten(1).sum(1).tolist()))
            return super().forward(x)

    network = Watching(*small_network())
    hook = torch.optim.lr_scheduler.OneCycleLR.step

    def step(self, *args):
        hook(self, *args)
        rates.append(self.get_last_lr()[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step", step)
        fit_classifier(network, stripes(96), stripes(8), FAST, 0, progress=False)
    assert len(seen) == len(set(seen)) == 18
    assert len(rates) == 19  # before each of the 18 steps, and once after
    assert rates[3] == max(rates) == pytest.approx(FAST.lr, rel=0.01)
    assert rates[0] < 0.1 * FAST.lr and rates[17] < 1e-4 * FAST.lr


def test_evaluation_counts_right_answers_and_averages_the_loss():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([2.0, 0.0]))

        def forward(self, x):
            return self.logits.expand(len(x), 2)

    pictures = stripes(9)  # five of class 0, four of class 1
    scores = evaluate_classifier(Constant(), pictures, batch=4)
    wrong = torch.log1p(torch.exp(torch.tensor(2.0))).item()
    assert scores["accuracy"] == pytest.approx(5 / 9)
    assert scores["loss"] == pytest.approx((5 * (wrong - 2) + 4 * wrong) / 9, rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run():
    network = small_network()
    with torch.no_grad():
        network[-1].weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"loss became nan in epoch 1 .*0\.01.*lower lr"):
        fit_classifier(network, stripes(32), stripes(8), FAST, 0, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"epochs": 0}, "epochs=0"), ({"lr": 0.0}, r"lr=0\.0"), ({"batch": 33}, "batch=33"), ({"device": "tpu"}, "'tpu'")],
)
def test_impossible_settings_are_quoted(change, message):
    settings = ClassifierTraining(**{"epochs": 1, "batch": 16, "device": "cpu", "precision": "fp32", **change})
    with pytest.raises((TrainingError, ValueError), match=message):
        fit_classifier(small_network(), stripes(32), stripes(8), settings, 0, progress=False)


def test_ctrl_c_is_an_ordinary_interrupt_and_works_again_afterwards():
    import signal

    class Stopped(nn.Sequential):
        def forward(self, x):
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch 1; nothing was kept"):
        fit_classifier(Stopped(*small_network()), stripes(32), stripes(8), FAST, 0, progress=False)
    assert signal.getsignal(signal.SIGINT) is before
