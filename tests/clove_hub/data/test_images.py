"""A picture is decoded right or called broken."""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import encoded, jpeg, picture
from PIL import Image, features

from clove_hub.data.images import decode, fast_jpeg, pixel_bytes
from clove_hub.training.sources import BrokenImage


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


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


def test_cmyk_is_decoded_to_the_colors_it_stands_for() -> None:
    for ink, color in {
        (0, 255, 255, 0): (255, 0, 0),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (0, 0, 0, 0): (255, 255, 255),
    }.items():
        pixels = decode(encoded(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
        assert np.abs(pixels.astype(int) - color).max() <= 4


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    image = Image.new(mode, (3, 1), (0, 0, 0, 255)[-len(mode) :] if mode == "RGBA" else (0, 255))
    image.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    assert decode(encoded(image)).tolist() == [[[0] * 3, [255] * 3, [204] * 3]]


def test_a_palette_is_decoded_to_its_colors() -> None:
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
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
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
    # Which is how multiprocessing sends it.
    error = pickle.loads(pickle.dumps(BrokenImage("a.jpg", "torn")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "torn", "a.jpg: torn")


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_decoded() -> None:
    pixels = decode(encoded(Image.new("RGB", (32, 32), (200, 30, 30)), "AVIF"))
    assert np.abs(pixels.astype(int) - (200, 30, 30)).max() <= 8


def test_what_a_package_of_its_own_reads_stands_upright_too() -> None:
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: pip install 'clove-hub[heic]'")
    heif.register_heif_opener()
    upright = np.asarray(picture())
    for number, stored in STORED.items():
        image = Image.fromarray(np.ascontiguousarray(stored(upright)))
        data = encoded(image, "HEIF", quality=95, chroma=444, exif=with_orientation(number))
        for brand in (b"heic", b"mif1"):  # as phones, and as other programs call it
            pixels = decode(data[:8] + brand + data[12:])
            assert pixels.shape == upright.shape
            assert np.abs(pixels.astype(int) - upright).mean() < 3
        assert pixel_bytes(data) == upright.size


def test_jpeg_xl_has_an_orientation_of_its_own_and_exif_does_not_count() -> None:
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed: pip install 'clove-hub[jxl]'")
    upright = np.asarray(picture())
    data = encoded(picture(), "JXL", lossless=True, exif=with_orientation(6))
    np.testing.assert_array_equal(decode(data), upright)


def test_a_jpeg_inside_jpeg_xl_is_turned_as_the_jpeg_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed: pip install 'clove-hub[jxl]'")
    whole = encoded(picture(), "JPEG", quality=95, exif=with_orientation(6))
    (tmp_path / "a.jpg").write_bytes(whole)
    with Image.open(tmp_path / "a.jpg") as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        repacked = encoded(image, "JXL")
    np.testing.assert_array_equal(decode(repacked), decode(whole))


def test_twelve_bits_and_zero_for_white_are_scaled_and_turned_around() -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed: it comes with scikit-image")
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="miniswhite")
    np.testing.assert_array_equal(decode(file.getvalue())[..., 0], 255 - values // 256)
    twelve = (values >> 4).reshape(-1, 2).astype(np.int64)  # two numbers in three bytes
    packed = np.stack([twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1)
    head = (
        *((256, 4, 64), (257, 4, 4), (258, 3, 12), (259, 3, 1), (262, 3, 1)),
        *((273, 4, 124), (277, 3, 1), (278, 4, 4), (279, 4, packed.size)),
    )  # tag, type, value
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in head)
    tiff = (b"II*\0\x08\0\0\0" + struct.pack("<H", len(head)) + entries).ljust(124, b"\0")
    pixels = decode(tiff + packed.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(pixels[..., 0], values // 256)


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


def test_draft_turns_an_image_upright_and_keeps_gray_and_four_inks() -> None:
    turned = encoded(picture(size=(400, 200)), "JPEG", exif=with_orientation(6))
    assert decode(turned, draft=100).shape == (200, 100, 3)
    gray = decode(encoded(picture(size=(400, 200)).convert("L"), "JPEG"), draft=100)
    assert gray.shape == (100, 200, 3)
    assert (gray == gray[..., :1]).all()
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
        (None, r"Pillow \(pip install 'clove-hub.fast.' for a faster decoder\)"),
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


def test_the_faster_decoder_gets_plain_color_jpegs_alone(install: Callable[[object], None]) -> None:
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
