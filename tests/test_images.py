"""Sources find the images there are and say what is missing; a picture is decoded right or called broken."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import sys
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from clove_hub.training import recipe
from clove_hub.training.images import BrokenImage, DataSettings, Encoded, Source, Stream, decode, open_source
from clove_hub.training.images import shards as shards_module
from clove_hub.training.images.decode import fast_jpeg, pixel_bytes
from clove_hub.training.images.stream import buffered, in_turn
from PIL import Image, features


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def picture(number: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Smooth colours, different for each number, without any symmetry."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 200, width), np.linspace(0, 150, height))
    channels = (across + 5 * (number % 11), down + 50, (across + down) / 2 + 3 * (number % 17))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def jpeg(number: int) -> bytes:
    return encoded(picture(number), "JPEG", quality=90)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set may be found in, or left behind in, the cache of whoever runs the tests."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


# ---- decoding --------------------------------------------------------------------------------------------


def test_a_plain_image_is_decoded_to_its_pixels() -> None:
    pixels = decode(encoded(picture()))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


def test_real_photos_are_decoded_as_pillow_decodes_them(photos: Path) -> None:
    for path in sorted(photos.rglob("*.jpg"))[:5]:
        with Image.open(path) as image:
            np.testing.assert_array_equal(decode(path.read_bytes()), np.asarray(image.convert("RGB")))


# How each orientation stores the upright picture, from the EXIF standard: where its row 0; column 0 belong.
STORED = {
    1: lambda p: p,  # top; column 0 the left side
    2: lambda p: p[:, ::-1],  # top; right
    3: lambda p: p[::-1, ::-1],  # bottom; right
    4: lambda p: p[::-1],  # bottom; left
    5: lambda p: p.transpose(1, 0, 2),  # left; top
    6: lambda p: p[:, ::-1].transpose(1, 0, 2),  # right; top
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),  # right; bottom
    8: lambda p: p[::-1].transpose(1, 0, 2),  # left; bottom
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", sorted(STORED))
def test_an_image_with_an_exif_orientation_stands_upright(orientation: int, kind: str) -> None:
    upright = np.asarray(picture())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(stored, kind, exif=with_orientation(orientation), **options)), upright)


def test_damaged_exif_beside_good_pixels_does_not_matter() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(data).shape == (30, 40, 3)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    for kind in ("PNG", "TIFF"):
        pixels = decode(encoded(Image.fromarray(values), kind))
        np.testing.assert_array_equal(pixels, np.repeat((values // 256)[..., None], 3, axis=-1))


def test_sixteen_bits_with_the_high_byte_first_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(1, 64)
    data = b"P5 64 1 65535\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(data)[..., 0], values // 256)


def test_cmyk_is_decoded_to_the_colours_it_stands_for() -> None:
    for ink, colour in {
        (0, 255, 255, 0): (255, 0, 0),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255, 255, 255),
    }.items():
        pixels = decode(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
        assert np.abs(pixels.astype(int) - colour).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    image = Image.new(mode, (3, 1), (0, 0, 0, 255)[-len(mode) :] if mode == "RGBA" else (0, 255))
    image.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    assert decode(encoded(image)).tolist() == [[[0] * 3, [255] * 3, [204] * 3]]


def test_a_palette_is_decoded_to_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert decode(encoded(image, transparency=0)).tolist() == [[[255] * 3, [200, 100, 50]]]
    assert decode(encoded(image, transparency=bytes([0, 255]))).tolist() == [[[255] * 3, [200, 100, 50]]]


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.fromarray(np.array([[True, False]]))
    assert decode(encoded(image)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert (decode(data) == (255, 0, 0)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_a_truncated_image_is_broken(kind: str) -> None:
    data = encoded(picture(size=(200, 150)), kind)
    with pytest.raises(BrokenImage):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404 not found</html>", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "floats"),
        (encoded(Image.new("I", (4, 4), 100_000), "TIFF"), "32-bit integers"),
    ],
    ids=["empty", "html", "png head", "float", "int32"],
)
def test_a_broken_image_says_its_name_and_why(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(data, "album/7.jpg")
    assert caught.value.name == "album/7.jpg"
    assert reason in caught.value.reason


def test_damage_in_the_middle_never_raises_anything_but_broken_image() -> None:
    generator = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"):
            whole = np.frombuffer(encoded(picture(), kind), np.uint8)
            broken = 0
            for _ in range(40):
                damaged = whole.copy()
                damaged[generator.integers(0, len(whole), 8)] = generator.integers(0, 256, 8)
                try:
                    assert decode(damaged.tobytes()).shape[2] == 3
                except BrokenImage:
                    broken += 1
            assert broken or kind in ("BMP", "GIF", "JPEG", "TIFF"), "checksums must catch damage"


def test_an_image_with_too_many_pixels_is_broken_before_they_are_unpacked() -> None:
    """A small file that claims 400 million pixels: a decompression bomb."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    with pytest.raises(BrokenImage, match="400000000 pixels"):
        decode(data)


def test_a_large_image_is_decoded_in_full() -> None:
    assert decode(encoded(Image.new("1", (9000, 4000), 1), "PNG")).shape == (4000, 9000, 3)


def test_a_broken_image_survives_the_way_back_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(BrokenImage("a.jpg", "torn")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "torn", "a.jpg: torn")


# ---- draft -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "size"), [(None, 400), (401, 400), (201, 400), (200, 200), (101, 200), (100, 100), (9, 50)]
)
def test_draft_halves_a_jpeg_as_often_as_its_short_side_allows(draft: int | None, size: int) -> None:
    data = encoded(picture(size=(603, 400)), "JPEG", quality=95)
    pixels = decode(data, draft=draft)
    assert pixels.shape == (size, -(-603 * size // 400), 3)  # rounded up
    assert pixel_bytes(data, draft) == pixels.nbytes
    averaged = np.asarray(picture(size=(603, 400)).resize(pixels.shape[1::-1], Image.Resampling.BOX))
    assert np.abs(pixels.astype(int) - averaged).mean() < 2


def test_draft_turns_an_image_upright_and_keeps_grey_and_four_inks() -> None:
    turned = encoded(picture(size=(400, 200)), "JPEG", exif=with_orientation(6))
    assert decode(turned, draft=100).shape == (200, 100, 3)
    grey = decode(encoded(picture(size=(400, 200)).convert("L"), "JPEG"), draft=100)
    assert grey.shape == (100, 200, 3)
    assert (grey == grey[..., :1]).all()
    inks = decode(encoded(Image.new("CMYK", (400, 200), (0, 255, 255, 0)), "JPEG", quality=95), draft=100)
    assert inks.shape == (100, 200, 3)
    assert np.abs(inks.astype(int) - (255, 0, 0)).max() <= 4


def test_draft_leaves_other_formats_as_they_are() -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode(encoded(picture(size=(400, 200)), kind), draft=100).shape == (200, 400, 3)


# ---- the faster decoder ----------------------------------------------------------------------------------


def pillow_as_simplejpeg(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    """The smallest of 1, 1/2, 1/4 and 1/8 of the image that has at least these sides."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        shrink = max(
            s for s in (1, 2, 4, 8) if s == 1 or (-(-width // s) >= min_width and -(-height // s) >= min_height)
        )
        image.draft(None, (width // shrink, height // shrink))
        return np.array(image)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[object], None]]:
    """Makes a function (or what is given instead of one) the decoder of a module named simplejpeg."""

    def replace(decoder: object) -> None:
        module = None if decoder is None else SimpleNamespace(decode_jpeg=decoder)
        monkeypatch.setitem(sys.modules, "simplejpeg", module)
        fast_jpeg.cache_clear()

    yield replace
    monkeypatch.undo()
    fast_jpeg.cache_clear()


def broken_library(*_: object, **__: object) -> None:
    raise OSError("undefined symbol: tj3Decompress8")


def other_rounding(data: bytes, **sides: int) -> np.ndarray:
    return pillow_as_simplejpeg(data, **sides) ^ 1


def without_scaling(data: bytes, **_: int) -> np.ndarray:
    return pillow_as_simplejpeg(data, 10_000, 10_000)


@pytest.mark.parametrize(
    ("decoder", "words"),
    [
        (None, "Pillow .*cannot be loaded.*pip install 'clove-hub.fast.'"),
        (broken_library, "Pillow .*fails: undefined symbol"),
        (other_rounding, "Pillow .*other pixels"),
        (without_scaling, "Pillow .*other pixels"),
    ],
)
def test_a_decoder_that_does_not_do_what_pillow_does_is_not_used(
    install: Callable[[object], None], decoder: object, words: str
) -> None:
    install(decoder)
    found, says = fast_jpeg()
    assert found is None
    assert re.search(words, says)
    np.testing.assert_array_equal(
        decode(encoded(picture(), "JPEG")), pillow_as_simplejpeg(encoded(picture(), "JPEG"), 30, 40)
    )


def test_the_faster_decoder_gets_plain_colour_jpegs_alone(install: Callable[[object], None]) -> None:
    seen: list[bytes] = []

    def watched(data: bytes, **sides: int) -> np.ndarray:
        seen.append(data)
        return pillow_as_simplejpeg(data, **sides)

    install(watched)
    assert fast_jpeg()[1] == "simplejpeg"
    plain = [encoded(picture(1), "JPEG"), encoded(picture(2), "JPEG", exif=with_orientation(6), progressive=True)]
    special = [encoded(picture().convert(mode), "JPEG") for mode in ("L", "CMYK")] + [encoded(picture(), "PNG")]
    seen.clear()
    for data in (*plain, *special):
        decode(data)
    assert seen == plain


def test_what_the_faster_decoder_refuses_or_gets_wrong_is_left_to_pillow(install: Callable[[object], None]) -> None:
    expected = decode(jpeg(3))
    calls: list[int] = []

    def on_strike(data: bytes, **sides: int) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:  # two for the trial
            raise ValueError("Corrupt JPEG data: 3 extraneous bytes before marker 0xd9")
        return pillow_as_simplejpeg(data, **sides)[: 5 if len(calls) == 4 else None]

    install(on_strike)
    for _ in range(2):
        np.testing.assert_array_equal(decode(jpeg(3)), expected)
    assert len(calls) == 4


def outcome(data: bytes, draft: int | None) -> tuple[str, bytes]:
    """Everything that `decode` does with a file: its pixels, or why there are none."""
    try:
        pixels = decode(data, draft=draft)
    except BrokenImage as error:
        return error.reason, b""
    assert pixels.flags.writeable
    return str(pixels.shape), pixels.tobytes()


def compare_with_pillow(install: Callable[[object], None], files: list[bytes], draft: int | None = None) -> None:
    module = pytest.importorskip("simplejpeg", reason="the extra 'fast' is not installed")
    install(module.decode_jpeg)
    assert fast_jpeg()[0] is module.decode_jpeg, fast_jpeg()[1]
    fast = [outcome(data, draft) for data in files]
    install(None)
    assert fast == [outcome(data, draft) for data in files]


@pytest.mark.parametrize("draft", [None, 60])
def test_simplejpeg_decodes_real_photos_to_the_bit_as_pillow(
    install: Callable[[object], None], photos: Path, draft: int | None
) -> None:
    compare_with_pillow(install, [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))[::29]], draft)


@pytest.mark.parametrize("draft", [None, 14])
def test_simplejpeg_decodes_every_kind_of_jpeg_as_pillow(install: Callable[[object], None], draft: int | None) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
    kinds = [
        {"subsampling": s, "quality": q, "progressive": p} for s in (0, 1, 2) for q in (30, 95) for p in (False, True)
    ]
    kinds += [{"exif": with_orientation(n)} for n in range(1, 9)] + [{"keep_rgb": True}, {"restart_marker_rows": 1}]
    compare_with_pillow(install, [encoded(noise, "JPEG", **kind) for kind in kinds], draft)


def test_simplejpeg_changes_nothing_about_damaged_files(install: Callable[[object], None]) -> None:
    generator = np.random.default_rng(1)
    noise = Image.fromarray(generator.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    files = []
    for whole in (encoded(noise, "JPEG"), encoded(noise, "JPEG", progressive=True)):
        files += [whole[:length] for length in generator.integers(0, len(whole), 40)]
        files += [whole[:-1], whole[:-2], whole + b"tail", whole[:-2] + b"\0\0\0" + whole[-2:]]
        for _ in range(300):
            damaged = bytearray(whole)
            for place in generator.integers(
                0, len(whole) if generator.random() < 0.5 else 700, generator.integers(1, 6)
            ):
                damaged[place] = generator.integers(0, 256)
            files.append(bytes(damaged))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compare_with_pillow(install, files)


# ---- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "data.path is empty"),
        ({"path": "x", "source": "zip"}, "data.source='zip'.*folder, huggingface, shards"),
        ({"path": "x", "workers": -1}, "data.workers=-1"),
        ({"path": "x", "source": "huggingface", "streaming": True, "length": 0}, "data.length=0"),
        ({"path": "x", "streaming": True}, "data.streaming is for data.source=huggingface"),
        ({"path": "x", "length": 5}, "data.length is for data.streaming=true"),
        ({"path": "x", "subset": "a"}, "data.subset is for data.source=huggingface"),
        ({"path": "x", "source": "huggingface", "streaming": True, "cache": True}, "data.cache keeps .*streaming=true"),
        ({"path": "x", "draft": 0}, "data.draft=0"),
        ({"path": ()}, "data.path is empty"),
        ({"path": ("x", "")}, "data.path is empty"),
        ({"path": ("x", "y"), "source": "shards"}, r"data.path=\['x', 'y'\].*not for 'shards'.*one path"),
    ],
)
def test_settings_that_cannot_be_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSettings(**values)


# ---- folder ----------------------------------------------------------------------------------------------


def files(folder: Path, *names: str) -> Path:
    """Writes picture i under the i-th name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(number))
    return folder


def from_folder(*paths: Path) -> Source:
    source = open_source(DataSettings(str(paths[0]) if len(paths) == 1 else tuple(map(str, paths))))
    assert not isinstance(source, Stream)
    return source


def names(source: Source) -> list[str]:
    return [source.read(index).name for index in range(len(source))]


def test_a_folder_is_read_at_any_depth_in_the_order_of_its_paths(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "b.JPEG", "a/z.png", "a/deep/er/1.jpg", "a.webp")
    source = from_folder(root)
    assert names(source) == ["a.webp", "a/deep/er/1.jpg", "a/z.png", "b.JPEG"]
    assert source.read(1) == Encoded("a/deep/er/1.jpg", jpeg(2))
    assert source.name == "photos"


def test_other_files_and_hidden_ones_are_not_images(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg", "notes.txt", "._a.jpg", ".thumbs/a.jpg", "labels.csv")
    assert names(from_folder(root)) == ["a.jpg"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg")
    files(tmp_path / "elsewhere", "b.jpg")
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    assert names(from_folder(root)) == ["a.jpg", "more/b.jpg"]


def test_a_file_name_that_is_not_text_is_read_and_can_be_printed(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg")
    with open(os.path.join(os.fsencode(root), b"caf\xe9.jpg"), "wb") as file:
        file.write(jpeg(1))
    source = from_folder(root)
    assert source.read(1) == Encoded("caf\\xe9.jpg", jpeg(1))
    source.read(1).name.encode("utf-8")


def test_an_image_that_vanished_is_broken_not_an_accident(tmp_path: Path) -> None:
    source = from_folder(files(tmp_path / "photos", "a.jpg", "b.jpg"))
    (tmp_path / "photos" / "b.jpg").unlink()
    with pytest.raises(BrokenImage, match=r"b.jpg: cannot be read: No such file"):
        source.read(1)


def test_an_index_outside_the_folder_is_refused(tmp_path: Path) -> None:
    source = from_folder(files(tmp_path / "photos", "a.jpg"))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            source.read(index)


def test_a_missing_folder_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path='.*nowhere' does not exist"):
        from_folder(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is a file.*data.source=shards"):
        from_folder(tmp_path / "set.tar")


def test_a_folder_without_images_says_what_was_looked_for_and_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no image.*\.jpeg, \.jpg.*there is no file at all"):
        from_folder(tmp_path)
    files(tmp_path, "a.txt", "b.txt", "c/d.tar")
    with pytest.raises(ValueError, match=r"found 2 x \.txt, 1 x \.tar\..*data.source=shards"):
        from_folder(tmp_path)


def test_a_folder_of_parquet_files_points_to_the_right_source(tmp_path: Path) -> None:
    files(tmp_path, "train.parquet")
    with pytest.raises(ValueError, match=r"data.source=huggingface"):
        from_folder(tmp_path)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files(tmp_path / "photos", "a.jpg", "locked/b.jpg")
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"locked.*Permission denied"):
        from_folder(root)


def test_a_fingerprint_tells_what_is_there_but_not_where(tmp_path: Path) -> None:
    first = from_folder(files(tmp_path / "one", "a.jpg", "b.jpg")).fingerprint
    assert len(first) == 64
    assert from_folder(files(tmp_path / "two", "a.jpg", "b.jpg")).fingerprint == first
    assert from_folder(files(tmp_path / "renamed", "a.jpg", "c.jpg")).fingerprint != first
    assert from_folder(files(tmp_path / "more", "a.jpg", "b.jpg", "c.jpg")).fingerprint != first
    (tmp_path / "two" / "b.jpg").write_bytes(jpeg(5))
    assert from_folder(tmp_path / "two").fingerprint != first


def test_several_folders_are_one_source_in_the_order_in_which_they_are_given(tmp_path: Path) -> None:
    train = files(tmp_path / "train", "z.jpg", "a.jpg")
    unlabeled = files(tmp_path / "unlabeled", "a.jpg", "b/c.jpg", "m.jpg")
    source = from_folder(train, unlabeled)
    assert source.name == "train+unlabeled"
    assert names(source) == [f"{train}/{n}" for n in ("a.jpg", "z.jpg")] + [
        f"{unlabeled}/{n}" for n in ("a.jpg", "b/c.jpg", "m.jpg")
    ]
    assert [source.read(index).data for index in range(5)] == [jpeg(number) for number in (1, 0, 0, 1, 2)]
    assert [image.rsplit("/")[-1] for image in names(from_folder(unlabeled, train))][:3] == ["a.jpg", "c.jpg", "m.jpg"]
    assert sorted(source.order(0, 0)) == list(range(5))
    for index in (-1, 5):
        with pytest.raises(IndexError):
            source.read(index)
    (unlabeled / "m.jpg").unlink()
    with pytest.raises(BrokenImage, match=r"unlabeled/m.jpg: cannot be read"):
        source.read(4)


def test_a_recipe_takes_one_folder_or_a_list_from_a_file_and_from_the_command_line() -> None:
    def path(override: str) -> object:
        loaded = recipe.load("slotcon_r50_cocoplus_800ep", [override])
        assert recipe.parse(recipe.as_sections(loaded)) == loaded
        return loaded.data.path

    assert path("data.path=[a, b/c]") == ("a", "b/c")
    assert path("data.path=a") == "a"
    for wrong, message in {
        "data.path=": "data.path is empty",
        "data.path=[]": "data.path is empty",
        "data.path=3": "data.path=3 is a int, expected str",
        "data.path=null": "data.path=None is a NoneType, expected str",
        "data.path=[a, 3]": r"data.path\[1\]=3 is a int, expected str",
    }.items():
        with pytest.raises(ValueError, match=message):
            path(wrong)


def test_one_folder_in_a_list_is_that_folder(tmp_path: Path) -> None:
    root = files(tmp_path / "photos", "a.jpg", "b.jpg")
    listed = open_source(DataSettings((str(root),)))
    assert isinstance(listed, type(from_folder(root)))
    assert listed.fingerprint == from_folder(root).fingerprint
    assert names(listed) == ["a.jpg", "b.jpg"]


def test_the_fingerprint_of_several_folders_covers_all_and_where_each_begins(tmp_path: Path) -> None:
    def written(name: str) -> tuple[Path, Path]:
        return files(tmp_path / name / "one", "a.jpg", "b.jpg"), files(tmp_path / name / "two", "c.jpg", "d.jpg")

    one, two = written("first")
    first = from_folder(one, two).fingerprint
    assert from_folder(*written("copy")).fingerprint == first
    assert from_folder(two, one).fingerprint != first
    for folder in written("changed"):
        (folder / "e.jpg").write_bytes(jpeg(3))
        assert from_folder(*(other.parents[1] / "changed" / other.name for other in (one, two))).fingerprint != first
        (folder / "e.jpg").unlink()
    moved_one, moved_two = written("moved")  # the same names and pictures in the same order, but for the border
    (moved_two / "c.jpg").rename(moved_one / "c.jpg")
    assert from_folder(moved_one, moved_two).fingerprint != first


def test_of_several_folders_the_wrong_one_is_named(tmp_path: Path) -> None:
    good = files(tmp_path / "good", "a.jpg")
    with pytest.raises(ValueError, match=r"data.path='[^']*nowhere' does not exist"):
        from_folder(good, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data.path='[^']*empty' holds no image"):
        from_folder(tmp_path / "empty", good)


@pytest.mark.parametrize("first", ["whole", "part"])
def test_folders_that_would_count_images_twice_are_refused(tmp_path: Path, first: str) -> None:
    whole = files(tmp_path / "whole", "a.jpg", "part/b.jpg")
    with pytest.raises(ValueError, match=r"'[^']*whole' and '[^']*whole' both lead to '[^']*whole'.*twice"):
        from_folder(whole, whole)
    both = [whole, whole / "part"] if first == "whole" else [whole / "part", whole]
    with pytest.raises(ValueError, match=r"both lead to '[^']*whole/part'.*twice.*leave one"):
        from_folder(*both)
    (tmp_path / "linked").symlink_to(whole)
    with pytest.raises(ValueError, match=r"both lead to"):
        from_folder(tmp_path / "linked", whole / "part")
    beside = files(tmp_path / "whole2", "a.jpg")  # a name that begins alike is another folder
    assert len(from_folder(whole, beside)) == 3


# ---- tar shards ------------------------------------------------------------------------------------------


def shard(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int) -> dict[str, bytes]:
    return {f"{number:06}.jpg": jpeg(number), f"{number:06}.cls": b"3", f"{number:06}.json": b"{}"}


def shards(folder: Path, count: int = 3, each: int = 2) -> Path:
    for number in range(count):
        members = {k: v for i in range(each) for k, v in sample(number * each + i).items()}
        shard(folder / f"train-{number:03}.tar", members)
    return folder


def from_shards(pattern: Path | str, column: str = "image") -> Source:
    source = open_source(DataSettings(str(pattern), source="shards", column=column))
    assert not isinstance(source, Stream)
    return source


@pytest.mark.parametrize("pattern", ["", "train-{000..002}.tar", "train-00{0,1,2}.tar", "train-*.tar"])
def test_shards_are_found_by_folder_braces_and_wildcards(tmp_path: Path, pattern: str) -> None:
    source = from_shards(shards(tmp_path / "set") / pattern)
    assert len(source) == 6
    assert source.read(5) == Encoded("train-002.tar/000005.jpg", jpeg(5))
    assert [source.read(index).data for index in range(6)] == [jpeg(index) for index in range(6)]


def test_a_single_shard_and_part_of_a_set_can_be_read(tmp_path: Path) -> None:
    folder = shards(tmp_path)
    assert len(from_shards(folder / "train-001.tar")) == 2
    assert names(from_shards(folder / "train-{001..002}.tar"))[0] == "train-001.tar/000002.jpg"


def test_long_member_names_and_folders_inside_a_shard_are_read(tmp_path: Path) -> None:
    long = "folder/" + "x" * 150 + ".jpg"
    source = from_shards(shard(tmp_path / "a.tar", {long: jpeg(1), "folder/2.png": jpeg(2)}))
    assert source.read(0) == Encoded(f"a.tar/{long}", jpeg(1))
    assert source.read(1).data == jpeg(2)


def test_a_sample_with_several_images_needs_a_column(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", {"1.jpg": jpeg(1), "1.seg.png": jpeg(2), "2.jpg": jpeg(3)})
    with pytest.raises(ValueError, match=r"sample '1' \(jpg, seg.png\).*data.column=jpg"):
        from_shards(path)
    assert names(from_shards(path, "jpg")) == ["a.tar/1.jpg", "a.tar/2.jpg"]
    assert names(from_shards(path, "seg.png")) == ["a.tar/1.seg.png"]
    with pytest.raises(ValueError, match=r"no member ending in .webp in 1 tar files; .*jpg, seg.png"):
        from_shards(path, "webp")


def test_a_shard_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image in 1 tar files; their members end in cls, json"):
        from_shards(shard(tmp_path / "a.tar", {"1.cls": b"1", "1.json": b"{}"}))
    with pytest.raises(ValueError, match="they have no members"):
        from_shards(shard(tmp_path / "b.tar", {}))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("train-{000..004}.tar", r"2 of 5 tar files do not exist, first '.*train-003.tar'"),
        ("nothing-*.tar", "matches no file"),
        ("empty", "without a .tar file"),
        ("train-{3..1}.tar", "runs backwards"),
    ],
)
def test_shards_that_are_not_there_are_an_error(tmp_path: Path, pattern: str, message: str) -> None:
    shards(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        from_shards(tmp_path / pattern)


def test_shards_behind_an_address_point_to_streaming() -> None:
    with pytest.raises(ValueError, match=r"data.streaming=true"):
        from_shards("https://example.org/{000..099}.tar")


def test_a_compressed_or_damaged_shard_is_an_error_that_names_it(tmp_path: Path) -> None:
    packed = shard(tmp_path / "packed.tar", sample(1), "w:gz")
    with pytest.raises(ValueError, match=r"packed.tar.*unpack it once"):
        from_shards(packed)
    torn = shard(tmp_path / "torn.tar", {"1.jpg": jpeg(1), "2.jpg": b"x" * 5000})
    torn.write_bytes(torn.read_bytes()[:4000])
    with pytest.raises(ValueError, match=r"torn.tar.*copy it again"):
        from_shards(torn)


def test_the_fingerprint_of_shards_follows_their_images(tmp_path: Path) -> None:
    first = from_shards(shards(tmp_path / "a")).fingerprint
    assert from_shards(shards(tmp_path / "b")).fingerprint == first
    assert from_shards(shards(tmp_path / "c", count=2)).fingerprint != first


def test_a_block_of_a_shard_is_fetched_as_a_whole_with_the_first_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_BLOCK", 8192)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, size)), raising=False)
    source = from_shards(shards(tmp_path, count=2, each=12))
    expected = [jpeg(number) for number in range(24)]
    assert len(source.blocks) >= 6
    assert [source.read(index).data for index in range(24)] == expected
    assert len(asked) == len(source.blocks)
    # All that is between the first byte of a block's first image and the last of its last, and nothing else.
    ends = [*source.blocks[1:].tolist(), 24]
    for (start, size), first, end in zip(asked, source.blocks.tolist(), ends, strict=True):
        assert start == source.offsets[first]
        assert start + size == source.offsets[end - 1] + source.sizes[end - 1]
        assert source.offsets[end - 1] < source.offsets[first] // 8192 * 8192 + 8192
    assert [source.read(index).data for index in range(24)] == expected
    assert len(asked) == len(source.blocks)


def test_blocks_never_reach_across_shards(tmp_path: Path) -> None:
    source = from_shards(shards(tmp_path, count=3, each=2))
    assert source.blocks.tolist() == [0, 2, 4]
    assert sorted(source.order(0, 0).tolist()) == list(range(6))


# ---- Hugging Face ----------------------------------------------------------------------------------------


def rows(count: int = 10) -> object:
    """A data set with an image column and others, one of them images too."""
    cells = [{"bytes": jpeg(number), "path": f"{number}.jpg"} for number in range(count)]
    columns = {"image": cells, "label": list(range(count)), "mask": cells}
    kinds = {"image": datasets.Image(), "label": datasets.Value("int64"), "mask": datasets.Image()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def as_parquet(folder: Path) -> Path:
    folder.mkdir()
    for part in range(2):
        piece = rows().shard(2, part, contiguous=True)
        piece.to_parquet(folder / f"train-{part:05}-of-00002.parquet")
    return folder


def as_arrow(folder: Path) -> Path:
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    table = rows()
    with ArrowWriter(path=str(folder / "train.arrow"), features=table.features) as writer:
        writer.write_table(table.data.table)
        writer.finalize()
    return folder


def as_saved(folder: Path) -> Path:
    rows().save_to_disk(folder)
    return folder


def as_saved_splits(folder: Path) -> Path:
    datasets.DatasetDict(train=rows(), validation=rows(3)).save_to_disk(folder)
    return folder


def as_images(folder: Path) -> Path:
    return files(folder, *(f"kind{number % 2}/{number}.jpg" for number in range(10)))


def as_bytes(folder: Path) -> Path:
    folder.mkdir()
    cells = datasets.Dataset.from_dict({"image": [jpeg(number) for number in range(10)]})
    cells.to_parquet(folder / "train.parquet")
    return folder


def as_one_file(folder: Path) -> Path:
    folder.mkdir()
    rows().to_parquet(folder / "everything.parquet")
    return folder / "everything.parquet"


def as_paths(folder: Path) -> Path:
    images = as_images(folder / "images")
    (folder / "table").mkdir()
    cells = {"image": [str(path) for path in sorted(images.rglob("*.jpg"))]}
    datasets.Dataset.from_dict(cells).to_parquet(folder / "table" / "train.parquet")
    return folder / "table"


EVERY_FORM = [as_parquet, as_arrow, as_saved, as_saved_splits, as_images, as_bytes, as_one_file, as_paths]


def table(path: Path | str, **settings: object) -> Source:
    source = open_source(DataSettings(str(path), source="huggingface", **settings))
    assert not isinstance(source, Stream)
    return source


def row_stream(path: Path | str, **settings: object) -> Stream:
    chosen = DataSettings(str(path), source="huggingface", streaming=True, **settings)
    source = open_source(chosen)
    assert isinstance(source, Stream)
    return source


@pytest.mark.parametrize("write", EVERY_FORM)
def test_a_data_set_gives_the_bytes_of_its_images(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    source = table(write(tmp_path / "set"))
    assert len(source) == 10
    assert {source.read(index).data for index in range(10)} == {jpeg(index) for index in range(10)}
    assert source.read(3) == source.read(3)
    assert source.read(3).name.startswith("train[3]")


@pytest.mark.parametrize("write", EVERY_FORM)
def test_a_stream_gives_every_image_once_in_an_order_of_seed_and_epoch(
    tmp_path: Path, write: Callable[[Path], Path]
) -> None:
    source = row_stream(write(tmp_path / "set"), length=10)
    assert len(source) == 10

    def walked(seed: int, epoch: int) -> list[bytes]:
        return [image.read().data for image in source.walk(seed, epoch)]

    assert sorted(walked(0, 0)) == sorted(jpeg(index) for index in range(10))
    assert walked(0, 0) == walked(0, 0)
    assert walked(0, 1) != walked(0, 0)
    assert walked(1, 0) != walked(0, 0)


def test_the_order_of_a_stream_goes_across_its_files_and_beyond_a_small_buffer() -> None:
    """Five files of ten items each, through a buffer of eight: neighbours come from different files."""
    iterators = [iter(range(10 * file, 10 * file + 10)) for file in range(5)]
    turned = list(in_turn(iterators, 3))
    assert sorted(turned) == list(range(50))
    assert turned[:6] == [0, 10, 20, 1, 11, 21]
    shuffled = list(buffered(iter(turned), np.random.default_rng(0), 8))
    assert sorted(shuffled) == list(range(50))
    assert shuffled != turned
    assert max(turned.index(item) - at for at, item in enumerate(shuffled)) <= 8
    assert list(buffered(iter([]), np.random.default_rng(0), 8)) == []


def test_the_files_of_a_stream_come_in_an_order_of_seed_and_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a buffer, one file at a time: the first image tells which file comes first."""
    monkeypatch.setattr("clove_hub.training.images.stream._BUFFER", 1)
    monkeypatch.setattr("clove_hub.training.images.stream._OPEN_FILES", 1)
    source = row_stream(as_saved(tmp_path / "set"))
    firsts = [next(source.walk(seed, epoch)).data for seed, epoch in [(0, 0)] * 2 + [(0, e) for e in range(1, 9)]]
    assert firsts[0] == firsts[1]
    assert len(set(firsts)) > 3
    assert len({next(source.walk(seed, 0)).data for seed in range(8)}) > 3


def test_a_stream_knows_its_length_where_the_data_set_does(tmp_path: Path) -> None:
    path = as_saved(tmp_path / "set")
    assert len(row_stream(path)) == 10
    assert len(row_stream(path, length=6)) == 6
    with pytest.raises(ValueError, match=r"data.length=11, but .* has 10 images"):
        row_stream(path, length=11)


def test_a_stream_of_unknown_length_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set data.length"):
        row_stream(as_parquet(tmp_path / "set"))


def test_the_spare_of_a_stream_is_its_first_good_image(tmp_path: Path) -> None:
    cells = [b"torn", None, jpeg(2), jpeg(3)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": cells}).to_parquet(tmp_path / "set" / "train.parquet")
    assert row_stream(tmp_path / "set", length=4).spare.data == jpeg(2)


def test_a_stream_without_a_good_image_is_an_error_at_start(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [b"torn", b""]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(ValueError, match=r"none of the first 2 images.*not an image"):
        row_stream(tmp_path / "set", length=2)


def test_a_row_without_an_image_is_broken(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"image": [jpeg(0), None]}).to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(BrokenImage, match=r"train\[1\]: the row holds no image"):
        table(tmp_path / "set").read(1)


def test_an_image_behind_an_address_is_fetched_or_broken() -> None:
    fsspec = pytest.importorskip("fsspec")
    from clove_hub.training.images import Pending

    with fsspec.open("memory://album/1.jpg", "wb") as file:
        file.write(jpeg(1))
    assert Pending("one", None, "memory://album/1.jpg").read() == Encoded("one", jpeg(1))
    with pytest.raises(BrokenImage, match="two: cannot be read"):
        Pending("two", None, "memory://album/2.jpg").read()


@pytest.mark.parametrize("open_it", [table, row_stream])
@pytest.mark.parametrize("write", [as_parquet, as_saved_splits])
def test_a_wrong_split_names_those_there_are(
    tmp_path: Path, write: Callable[[Path], Path], open_it: Callable[..., object]
) -> None:
    with pytest.raises(ValueError, match=r"data.split='nope'.*train"):
        open_it(write(tmp_path / "set"), split="nope")


@pytest.mark.parametrize("open_it", [table, row_stream])
def test_a_wrong_column_names_those_there_are(tmp_path: Path, open_it: Callable[..., object]) -> None:
    path = as_parquet(tmp_path / "set")
    with pytest.raises(ValueError, match=r"data.column='picture'.*image, label, mask"):
        open_it(path, column="picture")
    with pytest.raises(ValueError, match=r"data.column='label'.*int64.*image, mask"):
        open_it(path, column="label")


def test_another_split_and_column_can_be_chosen(tmp_path: Path) -> None:
    source = table(as_saved_splits(tmp_path / "set"), split="validation", column="mask")
    assert len(source) == 3
    assert source.read(2).data == jpeg(2)


@pytest.mark.parametrize(
    ("open_it", "no_rows"), [(table, "no data"), (lambda path: row_stream(path, length=2), "has no rows")]
)
def test_a_data_set_that_is_missing_or_empty_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_it: Callable[..., object], no_rows: str
) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        open_it(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty'.*cannot be opened"):
        open_it(tmp_path / "empty")
    (tmp_path / "no-rows").mkdir()
    rows(0).to_parquet(tmp_path / "no-rows" / "train.parquet")
    with pytest.raises(ValueError, match=rf"no-rows'.*{no_rows}"):
        open_it(tmp_path / "no-rows")
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: rows(0))
    (tmp_path / "no-rows" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no-rows'.*has no rows"):
        open_it(tmp_path / "no-rows")


def test_an_unknown_data_set_of_the_hub_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"data.path='nobody/nothing'.*cannot be opened"):
        table("nobody/nothing")


def test_the_fingerprint_of_a_data_set_is_the_same_in_every_form(tmp_path: Path) -> None:
    first = table(as_parquet(tmp_path / "a")).fingerprint
    assert table(as_saved(tmp_path / "b")).fingerprint == first
    assert table(as_saved_splits(tmp_path / "c"), split="validation").fingerprint != first


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_decoded() -> None:
    pixels = decode(encoded(Image.new("RGB", (32, 32), (200, 30, 30)), "AVIF"))
    assert np.abs(pixels.astype(int) - (200, 30, 30)).max() <= 8
