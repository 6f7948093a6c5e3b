"""What clients send becomes a model's inputs: by a call, from a saved artifact, with what is wrong named."""

import struct
import zlib

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from conversion_models import WORDS, colors_of, file_of, plain, words_of

import lepton_xla as lx
from lepton_xla.conversion import Conversion, Images, converter
from lepton_xla.conversion.pictures import Decoder
from lepton_xla.raw_inputs import resized

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "words.lepton"
    program = lx.take_texts(words_of(), WORDS, mask="mask", pad=3)
    lx.compile(program, {"batch": (1, 4)}, name="words").save(folder)
    return lx.load(folder)


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "colors.lepton"
    lx.compile(colors_of(), {"batch": (1, 4)}, name="colors").save(folder)
    return lx.load(folder)


def counts(*tokens):
    return np.bincount(tokens, minlength=4).astype(np.float32)


def test_texts_become_tokens_and_their_mask(texts):
    x = np.zeros((3, 4), np.float32)
    found = texts(text=["red blue", b"blue blue black", ""], x=x)["output"]
    np.testing.assert_array_equal(found, [counts(1, 2), counts(2, 2, 0), counts()])


def test_the_models_own_inputs_can_be_given_too(texts):
    given = {"tokens": np.int32([[1, 1, 0, 0]]), "mask": np.int32([[1, 1, 0, 0]]), "x": np.ones((1, 4), np.float32)}
    np.testing.assert_array_equal(texts(**given)["output"], [counts(1, 1) + 1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("red red red red red", "5 tokens; the model takes 4"),
        (b"\xff\xfe", "not UTF-8"),
        ("\ud800", "not UTF-8"),
        ("red " * 1000, "4000 bytes; at most 256"),
        (b"caf\xe9", "not UTF-8"),
    ],
)
def test_texts_that_are_refused(texts, text, said):
    with pytest.raises(lx.InputError, match=rf"'text', row 1.*{said}"):
        texts(text=["red", text], x=np.zeros((2, 4), np.float32))


def test_a_tokenizer_is_read_once_for_all_batches(monkeypatch):
    read, real = [], converter.HuggingFace
    monkeypatch.setattr(converter, "HuggingFace", lambda *how, **more: read.append(how) or real(*how, **more))
    program = lx.take_texts(words_of(), WORDS, mask="mask")
    assert [program.converted({"text": [word]})["tokens"][0, 0] for word in ("red", "blue")] == [1, 2]
    assert len(read) == 1


def test_longer_texts_are_cut_if_that_is_asked_for():
    program = lx.take_texts(words_of(), WORDS, mask="mask", truncate=True)
    assert program.converted({"text": ["red red red red blue"]})["tokens"].tolist() == [[1, 1, 1, 1]]


def test_a_length_that_varies_is_that_of_the_longest_text():
    program = lx.take_texts(words_of("length"), WORDS, mask="mask", length=8)
    assert program.converted({"text": ["red", "red blue green"]})["mask"].tolist() == [[1, 0, 0], [1, 1, 1]]


def test_what_a_tokenizer_says_of_lengths_is_not_used():
    """Published tokenizers often pad or cut."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(WORDS)
    made.enable_truncation(1)
    made.enable_padding(length=8)
    program = lx.take_texts(words_of(), made.to_str(), mask="mask")
    assert program.converted({"text": ["red blue"]})["mask"].tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_of_any_size_become_a_label(colors, kind):
    files = [file_of(plain(color, height, width), kind) for color, height, width in COLORED]
    found = colors(image=files)
    assert found["label"].tolist() == ["red", "grün", "blue"]
    logits = np.float64([color for color, _, _ in COLORED]) / 255
    expected = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).max(1)
    np.testing.assert_allclose(found["probability"], expected, atol=5e-3)


COLORED = [((250, 0, 10), 8, 8), ((0, 240, 10), 16, 3), ((10, 0, 240), 100, 70)]


def exif(orientation):
    found = Image.Exif()
    found[274] = orientation
    return found.tobytes()


def decoded(data, channels=3, size=8):
    step = Images(pixels="p", size="s", height=size, width=size, channels=channels, max_pixels=10_000)
    canvas = np.zeros((size, size, channels), np.uint8)
    height, width = Decoder(step).decode(data, canvas, "the image")
    return canvas[:height, :width]


def test_an_image_is_turned_as_its_exif_says():
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, 4:] = 255  # bright on the right
    found = decoded(file_of(pixels, "JPEG", quality=100, exif=exif(6)))  # to be turned to the right
    assert found.shape == (8, 4, 3)
    assert found[:3].max() < 30
    assert found[5:].min() > 225


def test_cmyk_gray_palette_and_alpha_become_rgb():
    red = plain((200, 0, 0), 4, 4)
    for mode, kind in (("CMYK", "JPEG"), ("P", "PNG")):
        np.testing.assert_allclose(decoded(file_of(red, kind, mode)).astype(int), red, atol=4)
    gray = np.full((4, 4), 90, np.uint8)
    np.testing.assert_array_equal(decoded(file_of(gray)), np.full((4, 4, 3), 90))
    clear = np.dstack([red, np.zeros((4, 4), np.uint8)])
    np.testing.assert_array_equal(decoded(file_of(clear)), np.full((4, 4, 3), 255))


def test_of_sixteen_bits_the_upper_eight_are_kept():
    deep = np.uint16([[0, 300, 40_000, 65_535]])
    np.testing.assert_array_equal(decoded(file_of(deep), channels=1)[..., 0], deep >> 8)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A small PNG that says it has so many pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_the_pixels_of_one_request_are_bounded_together_before_any_is_decoded(monkeypatch):
    step = Images(pixels="p", size="s", height=8, width=8, channels=3, max_pixels=10_000)
    convert = converter.Converter(Conversion(inputs={"image": step}), {"p": ("batch", 8, 8, 3), "s": ("batch", 2)})
    large = file_of(plain((200, 0, 0), 100, 100))
    # A JPEG file is decoded at an eighth of its size: it counts for little.
    files = [large, large, *[file_of(plain((200, 0, 0), 96, 96), "JPEG")] * 3]
    assert convert({"image": files[1:]}, images=2)["s"].tolist() == [[8, 8]] * 4
    assert len(convert({"image": [large] * 3})["s"]) == 3, "whoever has the files decodes as many as there are"
    monkeypatch.setattr(Image.Image, "convert", None)  # nothing is decoded
    with pytest.raises(lx.InputError, match="'image', row 2: more than 20000 pixels in one request; send fewer"):
        convert({"image": files}, images=2)


@pytest.mark.parametrize("side", [200, 12_000, 30_000])
def test_too_many_pixels_are_refused_by_the_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", None)  # nothing is decoded
    with pytest.raises(lx.InputError, match="more than 10000"):
        decoded(bomb(side, side))


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"hello", bomb(50, 50)[:40], file_of(plain(9), "JPEG")[:-200]])
def test_files_that_are_no_whole_images(data):
    with pytest.raises(lx.InputError, match="the image is no whole JPEG or PNG file"):
        decoded(data)


def test_other_formats_of_pillow_are_refused():
    for kind in ("BMP", "GIF", "TIFF"):
        with pytest.raises(lx.InputError, match="no whole JPEG or PNG"):
            decoded(file_of(plain(9), kind))


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (5, 7), (3, 3)])
def test_resizing_is_that_of_pillow(size):
    """Both are bilinear, as wide as a pixel of the result where that is larger; Pillow rounds to whole numbers."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    canvas = np.zeros((1, 16, 16, 3), np.uint8)
    canvas[0, : size[0], : size[1]] = pixels
    found = resized(jnp.asarray(canvas), jnp.int32([size]), (6, 6), "stretch")[0]
    expected = np.asarray(Image.fromarray(pixels).resize((6, 6), Image.Resampling.BILINEAR)).astype(float)
    middle = (slice(1, -1), slice(1, -1))
    np.testing.assert_allclose(found[middle], expected[middle], atol=1.5)
    np.testing.assert_allclose(found, expected, atol=30)  # at the edges the filters are cut otherwise


def test_cropping_takes_the_middle():
    pixels = np.zeros((1, 8, 16, 1), np.uint8)
    pixels[:, :, 4:12] = 200
    found = resized(jnp.asarray(pixels), jnp.int32([[8, 16]]), (4, 4), "crop")
    np.testing.assert_allclose(found[:, :, 1:3], 200, atol=1e-3)
    assert float(resized(jnp.asarray(pixels), jnp.int32([[8, 16]]), (4, 4), "stretch")[0, 0, 0, 0]) < 60


def test_words_of_a_vocabulary():
    program = lx.trace(lambda w, c: w[c], jnp.arange(3.0), {"c": lx.TensorSpec(("batch", 2), "int32")})
    model = lx.compile(lx.take_categories(program, "c", ["a", "é"]), {"batch": (2,)}).servable()
    assert model(c=[["é", "a"], [b"\xc3\xa9", "never seen"]])["output"].tolist() == [[2.0, 1.0], [2.0, 0.0]]
    strict = lx.take_categories(program, "c", ["a", "b"], others=False)
    assert strict.converted({"c": [["a", "b"]]})["c.index"].tolist() == [[0, 1]]
    with pytest.raises(lx.InputError, match="'c', element 1: 'x' is not in the vocabulary"):
        strict.converted({"c": [["a", "x"]]})


def test_a_damaged_conversion_is_named(tmp_path):
    folder = tmp_path / "colors.lepton"
    lx.compile(colors_of(), {"batch": (1,)}, name="colors").save(folder)
    file = folder / "conversion.json"
    file.write_bytes(file.read_bytes().replace(b"red", b"rad"))
    with pytest.raises(lx.ArtifactError, match=r"conversion\.json is damaged"):
        lx.load(folder)
    with pytest.raises(lx.ArtifactError, match="cannot be read"):
        Conversion.from_json(b'{"inputs": {"x": {"type": "code"}}}')


def test_a_conversion_must_fit_its_program():
    program = colors_of()
    with pytest.raises(lx.ModelError, match="no input 'image'"):
        lx.take_images(program, "image")
    with pytest.raises(lx.ModelError, match="2 names"):
        colors_of(names=("red", "blue"))
    step = msgspec.structs.replace(program.conversion.inputs["image"], height=99)
    with pytest.raises(lx.ModelError, match=r"becomes uint8\[rows, 99, 16, 3\]"):
        program.replace(conversion=Conversion(inputs={"image": step}))


def test_what_is_made_takes_the_place_of_nothing_else():
    inputs = {name: lx.TensorSpec(("batch",), "int32") for name in ("x", "c", "z")}
    program = lx.trace(lambda w, x, c, z: w[c] + w[x] * w[z], jnp.ones(3), inputs)
    for taken in ("x", "z"):
        with pytest.raises(lx.ModelError, match=f"has an input '{taken}' already"):
            lx.take_categories(program, "c", ["a"], index=taken)
    image = {"i": lx.TensorSpec(("batch", 4, 4), "float32"), "i.size": lx.TensorSpec(("batch",), "float32")}
    with pytest.raises(lx.ModelError, match=r"has an input 'i\.size' already"):
        lx.take_images(lx.trace(lambda w, i, size: i * size[:, None, None], {}, image), "i")
    scores = {"x": lx.TensorSpec(("batch", 2), "float32")}
    program = lx.trace(lambda w, x: {"output": x, "label": x[:, 0]}, {}, scores)
    with pytest.raises(lx.ModelError, match="has an output 'label' already"):
        lx.give_labels(program, ["cat", "dog"])
    assert list(lx.give_labels(program, ["cat", "dog"], label="name").outputs) == ["label", "name", "probability"]


def test_a_tokenizer_of_another_kind_is_named(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(b"\x0a\xff\xfe")
    with pytest.raises(lx.ModelError, match="not the JSON of Hugging Face's tokenizers"):
        lx.take_texts(words_of(), file)


def test_weights_alone_keep_the_conversion_of_their_base(tmp_path):
    from lepton_xla.compiler import make_update

    base = lx.compile(colors_of(), {"batch": (1,)}, name="colors").servable()
    program = colors_of()
    other = program.replace(weights={name: array[::-1] for name, array in program.weights.items()})
    make_update(base, other, version="2").save(tmp_path / "two.lepton")
    model = lx.load(tmp_path / "two.lepton", base=base)
    assert model(image=[file_of(plain((250, 0, 0)))])["label"].tolist() == ["blue"]


def test_golden_rows_and_examples_may_be_files(tmp_path):
    rows = {"image": [file_of(plain((250, 0, 0)))]}
    artifact = lx.compile(colors_of(), {"batch": (1, 2)}, name="colors", examples=rows, golden=rows)
    artifact.with_profile([rows]).save(tmp_path / "colors.lepton")
    assert lx.load(tmp_path / "colors.lepton", check=True).profile.rows == 1
