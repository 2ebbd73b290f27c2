"""data.py: reading as a viewer shows, masks, the decode cache."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import lesion, mvtec, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from support import data, depth, healthy, layouts
from support.cache import digest

S = 32


# -------------------------------------------------------------------------------- reading


def flat_grey(path: Path, mode: str, value: int, **save) -> Path:
    Image.new(mode, (40, 40), value).save(path, **save)
    return path


def seen(path: Path) -> np.ndarray:
    """The (3,) colour at the centre."""
    image = data.read_image(path, S)
    assert image.dtype == np.uint8 and image.shape == (3, S, S) and image.flags.c_contiguous
    return image[:, S // 2, S // 2].astype(int)


def test_rgb_keeps_its_channels(tmp_path):
    Image.new("RGB", (40, 40), (200, 100, 50)).save(tmp_path / "a.png")
    assert seen(tmp_path / "a.png").tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode,value,want", [("L", 90, 90), ("1", 1, 255)])
def test_grey_becomes_three_equal_channels(tmp_path, mode, value, want):
    assert seen(flat_grey(tmp_path / "a.png", mode, value)).tolist() == [want] * 3


def test_rgba_and_grey_alpha_lie_on_white(tmp_path):
    Image.new("RGBA", (40, 40), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("RGBA", (40, 40), (200, 0, 0, 255)).save(tmp_path / "solid.png")
    Image.new("LA", (40, 40), (0, 128)).save(tmp_path / "half.png")
    assert seen(tmp_path / "clear.png").tolist() == [255] * 3
    assert seen(tmp_path / "solid.png").tolist() == [200, 0, 0]
    assert np.abs(seen(tmp_path / "half.png") - 127).max() <= 1


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (40, 40), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", transparency=1)
    image.save(tmp_path / "c.gif")
    assert seen(tmp_path / "a.png").tolist() == [10, 200, 30]
    assert seen(tmp_path / "b.png").tolist() == [255] * 3
    assert seen(tmp_path / "c.gif").tolist() == [10, 200, 30]


@pytest.mark.parametrize("top", [255, 4095, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_by_their_range(tmp_path, top, suffix):
    ramp = np.linspace(0, top, 64).astype(np.uint16)
    Image.fromarray(np.tile(ramp, (64, 1))).save(tmp_path / f"a.{suffix}")
    image = data.read_image(tmp_path / f"a.{suffix}", 64)
    assert np.abs(image[:, 0].astype(float) - ramp / top * 255).max() <= 0.5 + 1e-4
    assert (image[0] == image[2]).all()


def test_floating_point_and_32_bit_files(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "f.tif")
    Image.fromarray((ramp * 65535).astype(np.int32)).save(tmp_path / "i.tif")
    for name in ("f.tif", "i.tif"):
        row = data.read_image(tmp_path / name, 64)[0, 0]
        assert row[0] == 0 and row[-1] == 255 and abs(int(row[32]) - 129) <= 1


def test_cmyk(tmp_path):
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    r, g, b = seen(tmp_path / "a.jpg")
    assert r > 240 and g < 15 and b < 15


@given(orientation=st.integers(1, 8), suffix=st.sampled_from(["jpg", "png"]))
def test_exif_orientation(tmp_path_factory, orientation, suffix):
    """The stored pixels are the inverse transform of what must be seen."""
    path = tmp_path_factory.mktemp("exif") / f"a.{suffix}"
    upright = np.full((64, 64), 10, np.uint8)
    upright[:32, :32], upright[:32, 32:] = 250, 130  # two corners fix all eight
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = inverse
    buffer = io.BytesIO()
    Image.fromarray(upright).save(buffer, "PNG", exif=exif)
    stored = ImageOps.exif_transpose(Image.open(buffer))
    exif[0x0112] = orientation
    stored.convert("RGB").save(path, exif=exif, quality=95)
    got = data.read_image(path, 64)[0]
    assert np.abs(got[4:28, 4:28].astype(int) - 250).max() < 8
    assert np.abs(got[4:28, 36:60].astype(int) - 130).max() < 8
    assert got[36:60, 4:60].max() < 20


def test_non_square_is_squeezed_with_antialiasing(tmp_path):
    stripes = np.zeros((64, 256), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: without antialiasing all black or all white
    Image.fromarray(stripes).save(tmp_path / "a.png")
    inner = data.read_image(tmp_path / "a.png", S)[:, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() <= 4


def test_an_edge_is_enlarged_bilinearly(tmp_path):
    """Another filter would change every image, and overshoot beside an edge."""
    edge = np.zeros((S, S), np.uint8)
    edge[:, S // 2 :] = 200
    Image.fromarray(edge).save(tmp_path / "a.png")
    row = data.read_image(tmp_path / "a.png", 2 * S)[0, 7]
    assert row.tolist() == [0] * (S - 1) + [50, 150] + [200] * (S - 1)


def test_small_files_are_enlarged_and_tiny_ones_refused(tmp_path):
    assert data.read_image(picture(tmp_path / "a.png", size=(28, 28)), 64).shape == (3, 64, 64)
    assert data.read_image(picture(tmp_path / "b.png", size=(8, 90)), 64).shape == (3, 64, 64)
    with pytest.raises(ValueError, match="c.png: 7 x 90 pixels"):
        data.read_image(picture(tmp_path / "c.png", size=(7, 90)), 64)
    with pytest.raises(ValueError, match="image size 31"):
        data.read_image(tmp_path / "a.png", 31)


@given(fraction=st.floats(0.05, 0.97), kind=st.sampled_from(["jpg", "progressive", "png", "bmp"]))
def test_truncated_files_are_never_half_an_image(tmp_path_factory, fraction, kind):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    suffix = "jpg" if kind == "progressive" else kind
    path = tmp_path_factory.mktemp("cut") / f"a.{suffix}"
    Image.fromarray(noise).save(path, progressive=kind == "progressive")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=path.name):
            data.read_image(path, S)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="c.png: no such file"):
        data.read_image(tmp_path / "c.png", S)


# ---------------------------------------------------------------------------------- masks


@given(
    width=st.integers(8, 90), height=st.integers(8, 90), seed=st.integers(0, 99), size=st.just(S)
)
def test_masks_are_nearest_neighbour(tmp_path_factory, width, height, seed, size):
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    mask[0, 0] = True
    path = tmp_path_factory.mktemp("mask") / "m.png"
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    rows = ((np.arange(size) + 0.5) * height / size).astype(int)
    columns = ((np.arange(size) + 0.5) * width / size).astype(int)
    got = data.read_mask(path, size)
    assert got.dtype == bool and (got == mask[np.ix_(rows, columns)]).mean() > 0.93
    # a source pixel on the border of two is a matter of rounding; every value is a neighbour's
    exact = np.abs((np.arange(size) + 0.5) * height / size % 1 - 0.5) < 0.49
    across = np.abs((np.arange(size) + 0.5) * width / size % 1 - 0.5) < 0.49
    assert (got == mask[np.ix_(rows, columns)])[np.ix_(exact, across)].all()


@pytest.mark.parametrize(
    "dtype,low,high",
    [("u1", 127, 128), ("u1", 0, 1), ("u2", 32767, 32768), ("u1", 0, 255), ("f4", 4e5, 6e5)],
)
def test_masks_are_binarised_at_half_of_the_range(tmp_path, dtype, low, high):
    mask = np.full((40, 40), low, dtype)
    mask[:, 20:] = high
    if high > 1:
        mask[:5] = 1e6 if dtype == "f4" else np.iinfo(dtype).max
    Image.fromarray(mask).save(tmp_path / "m.tif")
    got = data.read_mask(tmp_path / "m.tif", 40)
    assert not got[5:, :20].any() and got[:, 20:].all()


def test_masks_in_colour_jpeg_palette_one_bit_and_alpha(tmp_path):
    want = np.zeros((40, 40), bool)
    want[8:32, 8:32] = True
    red = np.zeros((40, 40, 3), np.uint8)
    red[want] = (200, 0, 0)
    Image.fromarray(red).save(tmp_path / "red.png")
    Image.fromarray(red[..., [1, 0, 2]]).save(tmp_path / "green.png")
    Image.fromarray(red).quantize(4).save(tmp_path / "palette.png")
    Image.fromarray(red).convert("CMYK").save(tmp_path / "ink.tif")
    Image.fromarray(want).save(tmp_path / "bit.png")
    Image.fromarray(want.astype(np.uint8) * 255).save(tmp_path / "jpeg.jpg", quality=60)
    alpha = np.full((40, 40, 4), 255, np.uint8)
    alpha[..., 3] = 255 * want
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "empty.png")
    files = "red.png green.png palette.png ink.tif bit.png jpeg.jpg alpha.png".split()
    for name in files:
        assert (data.read_mask(tmp_path / name, 40) == want).all(), name
    assert not data.read_mask(tmp_path / "empty.png", 40).any()


def test_a_mask_of_class_numbers_is_not_silently_empty(tmp_path):
    with pytest.raises(ValueError, match="m.png: no value above half, largest 2"):
        data.read_mask(lesion(tmp_path / "m.png", value=2), S)


def test_a_mask_of_another_size(tmp_path):
    mvtec(tmp_path)
    lesion(tmp_path / "ground_truth/polyp/1_mask.png", size=(41, 40))
    lesion(tmp_path / "ground_truth/polyp/2_mask.png", size=(20, 20))
    with pytest.raises(ValueError, match="1_mask.png: mask of 41 x 40.*40 x 40.*2_mask.png"):
        data.decode_masks(layouts.discover(tmp_path).test, S, tmp_path / "cache")


@pytest.mark.parametrize("orientation", range(9))  # 0: no EXIF
def test_a_mask_follows_its_image_when_exif_turns_it(orientation, tmp_path):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    stored, turned = (60, 40), (40, 60)
    (w, h), other = (turned, stored) if orientation >= 5 else (stored, turned)
    image = picture(tmp_path / "a.jpg", size=stored, exif=exif)
    data.read_mask(lesion(tmp_path / "m.png", size=(w, h)), S, image=image)
    with pytest.raises(ValueError, match=f"{h} x {w} pixels for an image of {w} x {h}"):
        data.read_mask(lesion(tmp_path / "m.png", size=other), S, image=image)


def test_decode_masks(tmp_path):
    found = layouts.discover(mvtec(tmp_path))
    masks, known = data.decode_masks(found.test, S, tmp_path / "cache")
    assert masks.dtype == np.uint8 and known.all() and not masks[:3].any()
    assert (masks[3:, :, : S // 2] == 1).all() and not masks[3:, :, S // 2 :].any()
    (tmp_path / "ground_truth/polyp/1_mask.png").write_text("broken")
    with pytest.raises(ValueError, match="1_mask.png: not an image"):
        data.decode_masks(found.test, S, tmp_path / "cache")
    masks, known = data.decode_masks(found.test, S, tmp_path / "cache", skip_bad=True)
    assert known.tolist() == [True] * 4 + [False, True] and not masks[4].any()


# ---------------------------------------------------------------------------------- cache


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that are opened, in any order."""
    names: list[str] = []
    load = data._load

    def noted(path: Path) -> Image.Image:
        names.append(path.name)
        return load(path)

    monkeypatch.setattr(data, "_load", noted)
    return names


def test_decode_equals_read_image_in_order(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(70)][::-1]
    images, kept = data.decode(paths, S, tmp_path / "cache")
    assert isinstance(images, np.memmap) and not images.flags.writeable
    assert images.dtype == np.uint8 and kept.dtype == np.int64 and kept.tolist() == list(range(70))
    for path, image in zip(paths, images, strict=True):
        assert (image == data.read_image(path, S)).all()


def test_decode_of_nothing(tmp_path):
    images, kept = data.decode([], S, tmp_path / "cache")
    assert images.shape == (0, 3, S, S) and kept.shape == (0,)


def test_the_cache_is_reused_for_the_same_list_and_size(tmp_path, reads):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    first = np.array(data.decode(paths, S, tmp_path / "cache")[0])
    assert len(reads) == 3
    assert (data.decode(paths, S, tmp_path / "cache")[0] == first).all() and len(reads) == 3
    data.decode(paths, 2 * S, tmp_path / "cache")
    assert len(reads) == 6  # another size
    data.decode(paths[:2], S, tmp_path / "cache")
    assert len(reads) == 8  # another list
    data.decode(paths, S, tmp_path / "cache")
    assert len(reads) == 8  # each has a file of its own


def test_every_unreadable_file_is_named_once(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(6)]
    paths[1].write_text("text")
    paths[3].write_bytes(picture(tmp_path / "x.jpg", 3).read_bytes()[:-200])
    paths[4].unlink()
    with pytest.raises(ValueError, match="3 of 6 files.*--skip-bad") as caught:
        data.decode(paths, S, tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message and all(message.count(f"{i}.png") == 1 for i in (1, 3, 4))
    assert not any((tmp_path / "cache").iterdir())


def test_skip_bad_goes_on_and_does_not_hide_them_later(tmp_path, reads):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(4)]
    paths[1].write_text("text")
    for _ in range(2):
        images, kept = data.decode(paths, S, tmp_path / "cache", skip_bad=True)
        assert kept.tolist() == [0, 2, 3] and images.shape == (3, 3, S, S)
        assert (images[1] == data.read_image(paths[2], S)).all()
    assert len(reads) == 4 + 2  # the second call read none but the two compared here
    with pytest.raises(ValueError, match="1.png"):
        data.decode(paths, S, tmp_path / "cache")


def test_skip_bad_with_nothing_left(tmp_path):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match="1 of 1 files"):
        data.decode([tmp_path / "a.png"], S, tmp_path / "cache", skip_bad=True)


def test_an_interrupted_decode_leaves_nothing(tmp_path, monkeypatch):
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(4)]

    def stop(path, size, window):
        if path.name == "2.png":
            raise KeyboardInterrupt
        return np.zeros((3, size, size), np.uint8)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "read_image", stop)
        data.decode(paths, S, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())
    images, _ = data.decode(paths, S, tmp_path / "cache")
    assert (images[0] == data.read_image(paths[0], S)).all()


def test_the_part_file_of_a_killed_run_is_cleared_and_a_live_one_kept(tmp_path):
    (tmp_path / "cache").mkdir()
    dead, live = tmp_path / "cache/a.u8.part-1", tmp_path / "cache/b.u8.part-2"
    dead.touch()
    live.touch()
    os.utime(dead, (0, 0))
    data.decode([picture(tmp_path / "a.png")], S, tmp_path / "cache")
    assert not dead.exists() and live.exists()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        data.decode([picture(tmp_path / "a.png")], S, tmp_path / "file/cache")


def test_skip_bad_keeps_each_image_with_its_label_and_its_mask(tmp_path):
    mvtec(tmp_path)
    (tmp_path / "test/good/1.png").write_text("text")
    found = layouts.discover(tmp_path)
    dataset, images, masks, _ = data.decode_test(found, S, tmp_path / "cache", skip_bad=True)
    assert dataset.test == (found.test[0], *found.test[2:])
    for sample, image, mask in zip(dataset.test, images, masks, strict=True):
        assert (image == data.read_image(sample.path, S)).all() and mask.any() == sample.label


@pytest.mark.parametrize("bad", [False, True])
def test_held_out_images_are_apart_from_those_that_train(bad, tmp_path):
    paths = [picture(tmp_path / f"{i:02d}.png", i) for i in range(20)]
    fit, others = healthy.split(paths, 0.5)
    if bad:
        fit[1].write_text("text")
    trained, images, held = data.decode_train(paths, 0.5, S, tmp_path / "cache", skip_bad=bad)
    assert trained == tuple(p for p in fit if not (bad and p == fit[1]))
    for files, decoded in ((trained, images), (others, held)):
        assert len(files) == len(decoded)
        assert all((data.read_image(f, S) == x).all() for f, x in zip(files, decoded, strict=True))


def test_infinite_values_are_shown_white_and_black_and_nan_black(tmp_path):
    values = np.full((32, 32), np.inf, np.float32)
    values[16:], values[:8] = -np.inf, np.nan
    Image.fromarray(values).save(tmp_path / "a.tif")
    image = data.read_image(tmp_path / "a.tif", S, (-100.0, 300.0))
    assert (image[:, 8:16] == 255).all() and not image[:, 16:].any() and not image[:, :8].any()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("values", "window"),
    [
        (((np.uint16, 200), (np.uint16, 4000)), (0, 4095)),
        (((np.float32, 0.5), (np.float32, 0.9)), (0, 1)),
        (((np.float32, 0.5), (np.uint16, 1)), (0, 1)),  # floats among them: values are shares
        (((np.uint16, 1), (np.uint16, 1)), (0, 255)),
        (((np.float32, 3), (np.float32, 3000)), (0, 4095)),
        (((np.float32, 3), (np.float32, 200)), (0, 255)),
        (((np.float32, 3), (np.float32, 1e6)), (0, 1e6)),
    ],
)
def test_the_range_of_a_set_holds_all_its_images_in_any_order(order, values, window, tmp_path):
    paths = [tmp_path / f"{k}.tif" for k in range(len(values))]
    for path, (kind, value) in zip(paths, values, strict=True):
        Image.fromarray(np.full((40, 40), value, kind)).save(path)
    assert depth.window_of_set(paths[::order], "") == window


@pytest.mark.parametrize("changed", ["time", "size"])
def test_a_file_that_has_changed_is_decoded_again(changed, tmp_path):
    file = tmp_path / "a.bmp"
    for k, value in enumerate((10, 90)):
        side = 40 + 10 * k * (changed == "size")
        Image.new("RGB", (side, side), (value, value, value)).save(file)
        os.utime(file, ns=(0, 1 + k * (changed == "time")))
        assert data.decode([file], S, tmp_path / "cache")[0][0, 0, 0, 0] == value


def test_other_images_under_the_same_names_have_another_digest(tmp_path):
    digests = set()
    for content in (b"one", b"other"):
        (tmp_path / "a.png").write_bytes(content)
        digests.add(digest([tmp_path / "a.png"], tmp_path))
    assert len(digests) == 2
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    assert digest(files, tmp_path) == digest(files[::-1], tmp_path)
