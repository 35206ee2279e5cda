"""MixedLabels views: torchvision's MixUp and CutMix, and a partner that follows from seed, sample and view alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.tiny import TinyTeacher, tiny_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms import v2

from kdcache import Samples, dump_teacher, open_cache
from kdcache.config.cache import CacheSpec
from kdcache.config.transform import Transform
from kdcache.data.images import ArrayImages
from kdcache.data.loader import batches
from kdcache.data.mixing import MIXINGS
from kdcache.data.replay import Replay, replay
from kdcache.data.views import View
from kdcache.errors import MismatchError, UsageError
from kdcache.losses.batch import MixedLabels

COUNT, HEIGHT, WIDTH = 40, 12, 9
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, HEIGHT, WIDTH), np.uint8))
TO_FLOAT: Transform = [{"ToDtype": {"dtype": "float32", "scale": True}}]
OWN: Transform = [{"RandomHorizontalFlip": {}}, {"RandomCrop": {"size": [HEIGHT, WIDTH], "padding": 2}}, *TO_FLOAT]
MIXUP: Transform = [{"MixUp": {"alpha": 0.2}}]
CUTMIX: Transform = [{"CutMix": {"alpha": 1.0}}]
EITHER: Transform = [{"RandomChoice": {"transforms": [*MIXUP, *CUTMIX]}}]
SOMETIMES: Transform = [{"RandomApply": {"transforms": MIXUP, "p": 0.3}}]

Array = npt.NDArray[np.float32]


def samples_of(pixels: Tensor = PIXELS) -> Samples:
    labels = np.arange(len(pixels), dtype=np.int32) % 5
    return Samples("noise", "train", ArrayImages(pixels), labels, tuple("abcde"), [])


def mixed_of(view: View, ids: list[int]) -> tuple[Tensor, MixedLabels]:
    batch = view.__getitems__(ids)
    assert batch.mixed is not None
    return batch.images, batch.mixed


# The reference: the two papers' formulas in NumPy, on what torch draws when it is seeded for a sample and a view


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    digest = blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=8).digest()
    with torch.random.fork_rng():
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield


def ratio(alpha: float) -> float:
    return float(torch.distributions.Beta(torch.tensor([alpha]), torch.tensor([alpha])).sample())


def mixup(own: Array, partner: Array, alpha: float) -> tuple[Array, float]:
    """Zhang et al. 2018 (1710.09412)."""
    share = ratio(alpha)
    return np.float32(share) * own + np.float32(1 - share) * partner, share


def cutmix(own: Array, partner: Array, alpha: float) -> tuple[Array, float]:
    """Yun et al. 2019 (1905.04899), section 3.1: a box of 1 - ratio of the area, cut off at the edges."""
    share = ratio(alpha)
    column, row = int(torch.randint(WIDTH, (1,))), int(torch.randint(HEIGHT, (1,)))
    wide, high = (int(0.5 * math.sqrt(1 - share) * side) for side in (WIDTH, HEIGHT))
    rows = slice(max(row - high, 0), min(row + high, HEIGHT))
    columns = slice(max(column - wide, 0), min(column + wide, WIDTH))
    out = own.copy()
    out[:, rows, columns] = partner[:, rows, columns]
    return out, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (HEIGHT * WIDTH)


class Expected(NamedTuple):
    image: Array
    share: float
    partner: int


def expected(mixing: Transform, index: int, seed: int, view: int) -> Expected:
    transform = v2.Compose(
        [v2.RandomHorizontalFlip(), v2.RandomCrop((HEIGHT, WIDTH), padding=2), v2.ToDtype(torch.float32, scale=True)]
    )
    with seeded(seed, index, view):
        own = transform(PIXELS[index]).numpy()
        partner = int(torch.randint(COUNT, ()))
        with seeded(seed, partner, view):
            other = transform(PIXELS[partner]).numpy()
        if mixing is EITHER:
            mixing = [MIXUP, CUTMIX][int(torch.multinomial(torch.tensor([0.5, 0.5]), 1))]
        if mixing is SOMETIMES:
            if torch.rand(1) >= 0.3:
                return Expected(own, 1.0, partner)
            mixing = MIXUP
        formula, alpha = (mixup, 0.2) if mixing is MIXUP else (cutmix, 1.0)
        return Expected(*formula(own, other, alpha), partner)


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, EITHER, SOMETIMES], ids=["MixUp", "CutMix", "either", "sometimes"])
@settings(deadline=None, max_examples=12)
@given(
    ids=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    view=st.integers(0, 10**6),
)
def test_a_mixed_image_is_that_of_the_formula_in_any_batch(
    mixing: Transform, ids: list[int], seed: int, view: int
) -> None:
    batch = View(samples_of(), [*OWN, *mixing], seed, view).__getitems__(ids)
    assert batch.mixed is not None
    assert batch.ids.tolist() == ids
    assert batch.labels.tolist() == [index % 5 for index in ids]
    assert batch.mixed.partner_labels.dtype == torch.int64
    assert batch.mixed.share.dtype == torch.float32
    for position, index in enumerate(ids):
        image, share, partner = expected(mixing, index, seed, view)
        np.testing.assert_allclose(batch.images[position], image, rtol=0, atol=2**-23)
        assert batch.mixed.share[position].item() == pytest.approx(share, abs=2**-24)
        assert batch.mixed.partner_labels[position] == partner % 5


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
@settings(deadline=None, max_examples=40)
@given(
    alpha=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**63 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
)
def test_mixtures_and_shares_are_those_of_torchvision(
    name: str, alpha: float, seed: int, shape: tuple[int, int, int]
) -> None:
    image, partner = torch.rand(2, *shape, generator=torch.Generator().manual_seed(seed)).unbind()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found, _, share = MIXINGS[name](alpha=alpha)(image, partner, 1.0)
        after = torch.rand(())
        torch.manual_seed(seed)
        # torchvision mixes image k of a batch with image k - 1, and their labels, here one-hot, alike.
        images, labels = getattr(v2, name)(alpha=alpha)(torch.stack([partner, image]), torch.eye(2))
        assert torch.equal(torch.rand(()), after)
    assert torch.equal(found, images[1])
    assert torch.tensor(share) == labels[1, 1]


def test_mixings_one_after_the_other_have_one_share() -> None:
    samples = samples_of(torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)]).repeat(30, 1, 1, 1))
    images, mixed = mixed_of(
        View(samples, [{"RandomApply": {"transforms": [*MIXUP, *CUTMIX], "p": 1.0}}]), list(range(60))
    )
    partners = torch.tensor([expected_partner(index, count=60) for index in range(60)])
    told = (torch.arange(60) + partners) % 2 == 1  # an image of zeros with one of ones
    ones = images[told].mean(dim=(1, 2, 3))
    share = mixed.share[told]
    torch.testing.assert_close(torch.where(torch.arange(60)[told] % 2 == 1, ones, 1 - ones), share)
    assert ((share > 0.01) & (share < 0.99)).sum() > 10


# What a picture shows, and what is said of it


def plain(count: int, side: int = 32) -> Samples:
    """Images of one color, which is the sample's id."""
    return samples_of(torch.arange(count, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, side, side))


def test_shares_and_partners_of_mixup_are_those_of_the_picture() -> None:
    count = 3000
    images, mixed = mixed_of(View(plain(count, side=2), [{"MixUp": {"alpha": 0.4}}]), list(range(count)))
    share = mixed.share.double()
    own = torch.arange(count)
    partner = (images[:, 0, 0, 0].double() - share * own) / (1 - share)
    told = share < 0.99  # where the partner shows well enough to be read off
    assert told.sum() > 0.7 * count
    seen = partner[told].round()
    assert (partner[told] - seen).abs().max() < 0.1
    assert torch.equal(seen.long() % 5, mixed.partner_labels[told])
    assert 0 <= seen.min() < 0.01 * count < 0.99 * count < seen.max() < count
    assert len(set(seen.tolist())) > 0.5 * len(seen)
    assert abs(np.corrcoef(own[told], seen)[0, 1]) < 0.08
    # Beta(a, a) has mean 1 / 2 and variance 1 / (4 (2 a + 1)); within five standard errors.
    assert share.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 7.2 / count))
    assert share.var().item() == pytest.approx(1 / 7.2, rel=0.1)


def test_the_share_of_cutmix_is_the_area_outside_a_box_that_shows_the_partner() -> None:
    count = 400
    images, mixed = mixed_of(View(plain(count), [{"CutMix": {"alpha": 1}}]), list(range(count)))
    boxes = 0
    for index, image in enumerate(images[:, 0]):
        colors = set(image.flatten().tolist()) - {index}
        assert len(colors) <= 1
        if expected_partner(index, count=count) == index:
            continue  # its box cannot be seen
        inside = image != index
        assert mixed.share[index].item() == pytest.approx(1 - inside.float().mean().item(), abs=1e-6)
        if colors:
            boxes += 1
            rows, columns = inside.any(dim=1), inside.any(dim=0)
            assert torch.equal(inside, rows[:, None] & columns[None, :])
            assert all((side.diff().abs() == 1).sum() <= 2 for side in (rows.int(), columns.int()))
            assert mixed.partner_labels[index] == colors.pop() % 5
    assert boxes > 0.9 * count


def test_a_partner_has_the_pixels_of_its_own_view() -> None:
    # Ratios are always a half: what is left of a mixture, its own image taken off, is the partner's own.
    alone = View(samples_of(), OWN, seed=3, view=2).__getitems__(range(COUNT)).images
    mixed, _ = mixed_of(View(samples_of(), [*OWN, {"MixUp": {"alpha": 1e30}}], seed=3, view=2), list(range(COUNT)))
    for index in range(COUNT):
        distances = (alone - (2 * mixed[index] - alone[index])).abs().amax(dim=(1, 2, 3))
        assert distances.min() < 1e-6


def test_other_views_mix_with_other_partners() -> None:
    data, mixed = View(samples_of(), [*TO_FLOAT, *MIXUP]), []
    for view in range(3):
        labels = data.batch(range(COUNT), view).mixed
        assert labels is not None
        mixed.append(labels)
    assert len({tuple(labels.partner_labels.tolist()) for labels in mixed}) == 3
    assert len({tuple(labels.share.tolist()) for labels in mixed}) == 3


def test_a_single_sample_is_mixed_with_itself() -> None:
    images, mixed = mixed_of(View(samples_of(PIXELS[:1]), [*TO_FLOAT, *MIXUP]), [0])
    torch.testing.assert_close(images[0], PIXELS[0] / 255)
    assert mixed.partner_labels.tolist() == [0]


def test_a_partner_with_a_hidden_label_has_no_label() -> None:
    hidden = torch.full((COUNT,), -1)
    hidden[: COUNT // 2] = torch.arange(COUNT // 2)
    batch = View(samples_of(), [*TO_FLOAT, *MIXUP], labels=hidden).__getitems__(range(COUNT))
    assert batch.mixed is not None
    assert torch.equal(batch.labels, hidden)
    partners = [expected_partner(index) for index in range(COUNT)]
    assert batch.mixed.partner_labels.tolist() == [hidden[partner] for partner in partners]
    assert 5 < sum(partner >= COUNT // 2 for partner in partners) < COUNT - 5


def expected_partner(index: int, view: int = 0, count: int = COUNT) -> int:
    """After a transform that draws nothing itself, the partner is the first draw."""
    with seeded(0, index, view):
        return int(torch.randint(count, ()))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3")
def test_workers_and_batch_boundaries_do_not_change_mixed_batches(workers: int) -> None:
    view = View(samples_of(), [*OWN, *EITHER], seed=11, view=4)
    whole, told = mixed_of(view, list(range(COUNT)))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(workers)).tolist()
    # The last cut is what one of two ranks would load.
    for batch in batches(view, [order[:1], order[1:8], order[8:10], order[1::2]], workers):
        assert batch.mixed is not None
        assert torch.equal(batch.images, whole[batch.ids])
        assert torch.equal(batch.mixed.share, told.share[batch.ids])
        assert torch.equal(batch.mixed.partner_labels, told.partner_labels[batch.ids])


# What cannot be


@pytest.mark.parametrize(
    ("transform", "words"),
    [
        ([*MIXUP, *TO_FLOAT], "^MixUp can only be the last step of a transform"),
        ([*CUTMIX, *MIXUP], "^CutMix can only be"),
        ([*CUTMIX, *MIXUP, *TO_FLOAT], "^CutMix and MixUp can only be"),
        ([*EITHER, *TO_FLOAT], "^CutMix and MixUp can only be"),
        ([{"RandomApply": {"transforms": [*TO_FLOAT, *MIXUP]}}], "^MixUp can only be"),
        ([{"RandomOrder": {"transforms": [*MIXUP, *CUTMIX]}}], "^CutMix and MixUp can only be"),
        ([{"Compose": {"transforms": [*TO_FLOAT, {"RandomChoice": {"transforms": MIXUP}}]}}], "^MixUp can only be"),
    ],
)
def test_a_mixing_that_is_not_the_last_step_is_refused_with_the_fix(transform: Transform, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        View(samples_of(), transform)
    assert "put it at the end" in caught.value.fix


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"MixUp": {"alpha": 0.2, "num_classes": 10}}, "transform MixUp: .*unexpected keyword argument 'num_classes'"),
        ({"CutMix": {"labels_getter": None}}, "transform CutMix: .*unexpected keyword argument 'labels_getter'"),
        ({"RandomChoice": {"transforms": [{"CutMix": {"beta": 1}}]}}, "transform CutMix: .*'beta'"),
        ({"MixUp": {"alpha": 0}}, "transform MixUp: alpha must be a finite float32 above 0, not 0"),
        ({"CutMix": {"alpha": -1.0}}, "transform CutMix: alpha must be a finite float32 above 0, not -1.0"),
        ({"MixUp": {"alpha": 1e-60}}, "transform MixUp: alpha must be a finite float32 above 0, not 1e-60"),
        ({"MixUp": {"alpha": math.inf}}, "transform MixUp: alpha must be a finite float32 above 0, not inf"),
        ({"MixUp": {"alpha": math.nan}}, "transform MixUp: alpha must be a finite float32 above 0, not nan"),
        ({"MixUp": {"alpha": None}}, "transform MixUp: .*NoneType"),
        ({"RandomChoice": {"transforms": [*MIXUP, *CUTMIX], "p": [1.0]}}, "transform RandomChoice: Length of p"),
        ({"MixUp": None}, "step {'MixUp': None} of a transform is not one name"),
    ],
)
def test_arguments_that_torchvision_or_a_student_cannot_use_are_refused(step: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        View(samples_of(), [*TO_FLOAT, step])
    assert caught.value.fix


def test_images_of_different_sizes_cannot_be_mixed() -> None:
    resize: Transform = [{"RandomResize": {"min_size": 4, "max_size": 40}}]
    with pytest.raises(UsageError, match=r"different sizes: \[3, \d+, \d+\] and \[3,") as caught:
        View(samples_of(), [*resize, *TO_FLOAT, *CUTMIX])[0]
    assert "Resize" in caught.value.fix


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_alpha_may_be_a_whole_number_and_is_1_by_default(name: str) -> None:
    written: list[dict[str, Any]] = [{"alpha": 1.0}, {"alpha": 1}, {}]
    first, *others = (View(samples_of(), [*TO_FLOAT, {name: alpha}]).__getitems__([3, 4]).images for alpha in written)
    assert all(torch.equal(first, other) for other in others)


# A cache of mixed views

SPEC = CacheSpec(top_k="all", dtype="float32", views=2, seed=5, shard_rows=48, batch_size=7)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "c.kdcache"
    dump_teacher(TinyTeacher(), tiny_samples(100), out, transform=EITHER, spec=SPEC)
    return out


def test_a_cache_of_mixed_views_holds_the_logits_of_the_mixtures(made: Path) -> None:
    cache, network, samples = open_cache(made), TinyTeacher(), tiny_samples(100)
    assert cache.labels.tolist() == samples.labels.tolist()
    teacher = cache.teacher()
    for view in range(2):
        images, mixed = mixed_of(View(samples, EITHER, 5, view), list(range(100)))
        assert (mixed.share < 0.9).sum() > 30
        torch.testing.assert_close(teacher(torch.arange(100), view), network(images), rtol=1e-5, atol=1e-5)
        unmixed = View(samples, [], 5, view).__getitems__(range(100)).images
        assert not torch.allclose(network(images), network(unmixed), atol=0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_replay_reproduces_the_mixtures(made: Path, workers: int) -> None:
    assert replay(open_cache(made), tiny_samples(100), num_workers=workers) == Replay(checked=68, rounded=0)


def test_replay_names_the_first_mixture_with_a_changed_image(made: Path) -> None:
    cache, samples = open_cache(made), tiny_samples(100)
    stride = cache.manifest.plan.shape.fingerprint_stride
    assert stride == 3
    shown_in: dict[int, list[tuple[int, int, float]]] = {}
    for view in range(2):
        _, mixed = mixed_of(View(samples, EITHER, 5, view), list(range(100)))
        for index in range(0, 100, stride):
            with seeded(5, index, view):
                partner = int(torch.randint(100, ()))
            shown_in.setdefault(partner, []).append((view, index, mixed.share[index].item()))
    # One that has no fingerprint itself, and is plainly to be seen wherever it is a partner.
    changed, (first, *_) = next(
        (partner, shown)
        for partner, shown in shown_in.items()
        if partner % stride and max(share for _, _, share in shown) < 0.9
    )
    pixels = View(samples, []).__getitems__(range(100)).images.clone()
    pixels[changed] += 40
    other = Samples("tiny", "train", ArrayImages(pixels), samples.labels, samples.class_names, [])
    with pytest.raises(MismatchError, match=f"view {first[0]} of sample {first[1]} is not what the teacher"):
        replay(cache, other)


def test_workers_change_no_byte_of_the_cache(made: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"num_workers": 1})
    again = dump_teacher(TinyTeacher(), tiny_samples(100), tmp_path / "c.kdcache", transform=EITHER, spec=spec)
    assert again.manifest.digest == open_cache(made).manifest.digest
