"""Pictures of every kind open; damaged ones are refused; cuts match resize-then-crop."""

import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from comfyui_personalize.models.errors import DatasetError
from comfyui_personalize.trainers.pictures import OpenPicture, Picture, covering_size, same_shape


def gradient(width=40, height=30):
    """Red grows to the right, green downwards: any turn or mirroring shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], axis=-1).astype(np.uint8))


def difference(first, second):
    return np.abs(np.asarray(first, dtype=float) - np.asarray(second, dtype=float)).max()


def saved(image, path, **options):
    image.save(path, **options)
    return Picture.from_file(path)


@pytest.mark.parametrize("ending", ["png", "bmp", "webp", "tiff", "ppm", "jpg", "JPEG"])
def test_formats_open_as_rgb(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {"quality": 98} if ending.lower().startswith("jp") else {}
    opened = saved(gradient(), tmp_path / f"a.{ending}", **options).open()
    assert opened.rgb.mode == "RGB"
    assert opened.mask is None
    assert difference(opened.rgb, gradient()) <= (12 if options.get("quality") else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    stored_as = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    image = gradient()
    for turn in stored_as[orientation]:
        image = image.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = saved(image, tmp_path / f"a.{ending}", exif=exif, **({"quality": 98} if ending == "jpg" else {}))
    assert picture.size == (30, 40)
    assert difference(picture.open().rgb, gradient()) <= (12 if ending == "jpg" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_picture_usable(tmp_path):
    path = tmp_path / "a.jpg"
    gradient().save(path, exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert Picture.from_file(path).size == (30, 40)


def test_cmyk_opens(tmp_path):
    picture = saved(gradient().convert("CMYK"), tmp_path / "a.jpg", quality=98)
    assert difference(picture.open().rgb, gradient()) <= 14


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    opened = saved(Image.fromarray(levels), tmp_path / f"a.{ending}").open()
    assert difference(np.asarray(opened.rgb)[..., 0], levels / 257) <= 0.5


@pytest.mark.parametrize(
    ("peak", "dtype"), [(65535, np.int32), (2**31 - 1, np.int32), (1.0, np.float32), (255.0, np.float32)]
)
def test_wide_grey_is_scaled_to_eight_bits(tmp_path, peak, dtype):
    levels = np.linspace(0, peak, 64).astype(dtype).reshape(8, 8)
    opened = saved(Image.fromarray(levels), tmp_path / "a.tiff").open()
    assert difference(np.asarray(opened.rgb)[..., 0], levels / peak * 255) <= 0.51


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "YCbCr", "LAB"])
def test_opaque_modes_have_no_mask(tmp_path, mode):
    ending = "tiff" if mode in ("YCbCr", "LAB") else "png"
    image = gradient().convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.merge("LAB", image.split())
    opened = saved(image, tmp_path / f"a.{ending}").open()
    assert opened.rgb.mode == "RGB"
    assert opened.mask is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white_and_becomes_the_mask(tmp_path, mode):
    image = Image.new("RGBA", (4, 2), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 2, 2))
    if mode == "P":
        image = image.quantize(16)
    opened = saved(image if mode == "P" else image.convert(mode), tmp_path / "a.png").open()
    assert np.asarray(opened.rgb)[0, :, 0].tolist() == [255, 255, 200, 200]
    assert np.asarray(opened.mask)[0].tolist() == [0, 0, 255, 255]


def test_rgb_with_a_transparent_colour_has_a_mask(tmp_path):
    image = Image.new("RGB", (2, 1), (9, 9, 9))
    image.putpixel((0, 0), (1, 2, 3))
    opened = saved(image, tmp_path / "a.png", transparency=(1, 2, 3)).open()
    assert np.asarray(opened.mask)[0].tolist() == [0, 255]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_animations_give_their_first_frame(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if ending == "webp" else {}
    picture = saved(frames[0], tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
    assert picture.open().rgb.getpixel((4, 4)) == (255, 0, 0)


def png_of(width, height):
    """A valid PNG header that promises width x height pixels, with next to none following."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def damaged_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = {}
    for ending in ("png", "jpg", "webp", "gif", "bmp", "tiff"):
        noise.save(source / f"a.{ending}")
        whole[ending] = (source / f"a.{ending}").read_bytes()
    return {
        "empty.png": (b"", "empty"),
        "text.jpg": (b"this is no picture", "not a picture"),
        "zero_size.png": (png_of(0, 0), ""),
        "bomb.png": (png_of(60_000, 60_000), "pixels"),
        "broad.png": (png_of(14_000, 14_000), "pixels"),
        "promised.png": (png_of(100, 100), "damaged or cut short"),
        **{f"cut.{ending}": (data[: len(data) // 2], "") for ending, data in whole.items()},
    }


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "name",
    ["empty.png", "text.jpg", "zero_size.png", "bomb.png", "broad.png", "promised.png"]
    + [f"cut.{ending}" for ending in ("png", "jpg", "webp", "gif", "bmp", "tiff")],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, name):
    data, reason = damaged_files(tmp_path)[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DatasetError) as refused:
        Picture.from_file(path)
    message = str(refused.value)
    assert name in message
    assert reason in message
    assert "\n" not in message
    assert "; " in message  # what to do follows what was found


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DatasetError, match=r"absent\.png: no such picture"):
        Picture.from_file(tmp_path / "absent.png")
    with pytest.raises(DatasetError, match="cannot be read"):
        Picture.from_file(tmp_path)


def test_a_file_that_changed_is_refused_once_and_then_read_anew(tmp_path):
    path = tmp_path / "a.png"
    picture = saved(gradient(), path)
    stamp = path.stat().st_mtime_ns
    Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(DatasetError, match="changed since"):
        picture.open()
    os.utime(path, ns=(stamp, stamp))
    assert Picture.from_file(path) != picture


def test_fully_transparent_picture_and_black_mask_are_refused(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    with pytest.raises(DatasetError, match=r"clear\.png: the picture is fully transparent"):
        Picture.from_file(tmp_path / "clear.png")
    with pytest.raises(DatasetError, match=r"black\.png: the mask is black"):
        Picture.from_file(tmp_path / "black.png", as_mask=True)
    assert Picture.from_file(tmp_path / "black.png").size == (4, 4)


def test_mask_is_read_from_brightness_or_transparency(tmp_path):
    grey = saved(Image.new("L", (3, 3), 128), tmp_path / "grey.png")
    half = saved(Image.new("RGBA", (3, 3), (0, 0, 0, 128)), tmp_path / "half.png")
    assert grey.open_mask().getpixel((1, 1)) == 128
    assert half.open_mask().getpixel((1, 1)) == 128


def test_equality_is_by_content_not_by_name(tmp_path):
    assert saved(gradient(), tmp_path / "a.png") == saved(gradient(), tmp_path / "b.png")
    assert saved(gradient(), tmp_path / "a.png") != saved(gradient(41), tmp_path / "c.png")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensor_and_file_give_the_same_pixels(tmp_path, channels):
    pixels = torch.randint(1, 256, (7, 9, channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    from_memory = Picture.from_tensor(pixels.float() / 255, "image 1")
    array = pixels.numpy()
    from_file = saved(Image.fromarray(array[..., 0] if channels == 1 else array), tmp_path / "a.png")
    assert from_memory.size == (7, 9)
    assert difference(from_memory.open().rgb, from_file.open().rgb) == 0


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.zeros(4, 4, 2), "shape"),
        (torch.zeros(0, 4, 3), "shape"),
        (torch.zeros(2, 4, 4, 3), "shape"),
        (torch.full((4, 4, 3), float("nan")), "NaN"),
        (torch.full((4, 4, 3), float("inf")), "NaN or infinite"),
    ],
)
def test_unusable_tensors_are_refused(tensor, reason):
    with pytest.raises(DatasetError, match=f"image 1.*{reason}"):
        Picture.from_tensor(tensor, "image 1")


def test_pictures_made_in_inference_mode_can_be_trained_on():
    with torch.inference_mode():
        picture = Picture.from_tensor(torch.rand(8, 8, 3), "image 1")
    pixels = picture.open().cut(8).pixels
    weight = torch.ones(3, 8, 8, requires_grad=True)
    (weight * pixels).sum().backward()
    assert torch.equal(weight.grad, pixels)


@pytest.mark.parametrize("size", [(30, 40), (40, 30), (33, 33), (17, 90), (100, 31)])
@pytest.mark.parametrize("target", [16, 64, (24, 56), (56, 24)])
def test_cut_equals_resizing_then_cropping(size, target):
    image = gradient(size[1], size[0])
    height, width = (target, target) if isinstance(target, int) else target
    full_height, full_width = covering_size(size, (height, width))
    resized = image.resize((full_width, full_height), Image.Resampling.BILINEAR)
    top, left = round((full_height - height) / 2), round((full_width - width) / 2)
    expected = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=float)
    cut = OpenPicture(image).cut(target)
    found = (cut.pixels.permute(1, 2, 0).numpy() + 1) * 127.5
    assert difference(found, expected) <= 1.01  # one level: the two passes round to 8 bits at other places
    assert cut.crop_top_left == (top, left)
    assert cut.original_size == size


def test_picture_of_the_training_size_is_untouched():
    cut = OpenPicture(gradient(32, 32)).cut(32)
    expected = torch.from_numpy(np.array(gradient(32, 32))).permute(2, 0, 1)
    assert torch.equal(((cut.pixels + 1) * 127.5).round().to(torch.uint8), expected)
    assert cut.pixels.min() >= -1
    assert cut.pixels.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 3), (3, 4999), (7, 7), (511, 513)])
@pytest.mark.parametrize("target", [8, 64, 512, (8, 512), (512, 8)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_any_size_can_be_cut(size, target, crop):
    generator = torch.Generator().manual_seed(3)
    mask = Image.new("L", (size[1], size[0]), 255)
    opened = OpenPicture(Image.new("RGB", (size[1], size[0]), (255, 0, 128)), mask)
    cut = opened.cut(target, crop=crop, flip=True, generator=generator)
    height, width = (target, target) if isinstance(target, int) else target
    assert cut.pixels.shape == (3, height, width)
    assert torch.equal(cut.pixels[0], torch.ones(height, width))
    assert torch.equal(cut.pixels[1], -torch.ones(height, width))
    assert torch.equal(cut.mask, torch.ones(1, height, width))
    full_height, full_width = covering_size(size, (height, width))
    assert 0 <= cut.crop_top_left[0] <= full_height - height
    assert 0 <= cut.crop_top_left[1] <= full_width - width


def test_random_cuts_follow_the_generator_and_reach_both_ends():
    opened = OpenPicture(gradient(20, 16))
    lefts = []
    for seed in range(40):
        first = opened.cut(16, crop="random", generator=torch.Generator().manual_seed(seed))
        again = opened.cut(16, crop="random", generator=torch.Generator().manual_seed(seed))
        assert torch.equal(first.pixels, again.pixels)
        lefts.append(first.crop_top_left[1])
    assert set(lefts) == {0, 1, 2, 3, 4}


def test_mask_is_cut_like_its_picture_even_at_another_scale():
    picture, mask = np.zeros((20, 60, 3), dtype=np.uint8), np.zeros((40, 120), dtype=np.uint8)
    picture[:, 30:], mask[:, 60:] = 255, 255
    cut = OpenPicture(Image.fromarray(picture), Image.fromarray(mask)).cut(20, flip=True)
    assert torch.equal(cut.mask[0] > 0.5, cut.pixels[0] > 0)
    assert cut.mask[0, :, :9].min() == 1  # mirrored: the white half is now on the left


def test_flip_mirrors_the_picture_and_its_offset():
    opened = OpenPicture(gradient(40, 16))
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    plain = opened.cut(16, crop="random", generator=generator)
    generator.set_state(state)
    flipped = opened.cut(16, crop="random", generator=generator, flip=True)
    assert torch.equal(flipped.pixels, plain.pixels.flip(-1))
    assert flipped.crop_top_left[1] == 40 - 16 - plain.crop_top_left[1]


def test_random_cut_without_generator_and_unknown_crop_are_errors():
    with pytest.raises(ValueError, match="generator"):
        OpenPicture(gradient()).cut(8, crop="random")
    with pytest.raises(ValueError, match="crop"):
        OpenPicture(gradient()).cut(8, crop="left")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ((30, 40), (60, 80), True),
        ((427, 640), (200, 300), True),
        ((30, 40), (40, 30), False),
        ((64, 64), (64, 80), False),
    ],
)
def test_same_shape(first, second, same):
    assert same_shape(first, second) is same


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "ppm", "avif"])
def test_corrupted_bytes_are_refused_or_read_but_never_crash(tmp_path, ending):
    if ending == "avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    gradient().save(tmp_path / f"whole.{ending}")
    whole = (tmp_path / f"whole.{ending}").read_bytes()
    chance = np.random.default_rng(7)
    refused = 0
    for attempt in range(40):
        data = bytearray(whole)
        for place in chance.integers(0, min(len(data), 400), size=6):
            data[place] = chance.integers(0, 256)
        path = tmp_path / f"{attempt}.{ending}"
        path.write_bytes(data)
        try:
            assert Picture.from_file(path).open().cut(16).pixels.shape == (3, 16, 16)
        except DatasetError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 0
