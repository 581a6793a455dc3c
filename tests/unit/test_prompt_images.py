"""Images that rows name: what a row may have read or fetched, and what of it the engine reads."""

from __future__ import annotations

import base64
import io
import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from batchgen.core.errors import ConfigError
from batchgen.core.records import RowError
from batchgen.engine.vllm import images
from batchgen.engine.vllm.encoder import ChatStyle
from batchgen.engine.vllm.images import render_images, with_local_images
from batchgen.job.load import load_job
from batchgen.job.model import PromptConfig
from batchgen.prompt.builder import PromptBuilder

SECRET = b"what the rows' author is not to see"


def built(pics, **prompt):
    prompt = {"user": "What is it?", **prompt}
    return PromptBuilder(PromptConfig(images="pics", **prompt)).build({"pics": pics})


def images_of(pics, **prompt):
    found = built(pics, **prompt)
    return found if isinstance(found, RowError) else found[-1]["content"]


def chat_of(url, **prompt):
    """A row's own messages with an image; its content, or the row's error."""
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
    messages = [{"role": "user", "content": parts}]
    found = PromptBuilder(PromptConfig(messages="m", **prompt)).build({"m": messages})
    return found if isinstance(found, RowError) else found[0]["content"]


def test_images_stand_before_the_text_of_the_last_user_message():
    parts = images_of(
        ["https://example.org/a.png", b"\x89PNG", None], image_domains=["Example.org"]
    )
    assert parts == [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {
            "type": "image_url",
            "image_url": {"url": "data:application/octet-stream;base64,iVBORw=="},
        },
        {"type": "text", "text": "What is it?"},
    ]
    assert images_of("/a b.png", images_folder="/")[0]["image_url"]["url"] == "file:///a%20b.png"
    relative = images_of("b.png", images_folder="/pics")
    assert relative[0]["image_url"]["url"] == "file:///pics/b.png"


def test_a_row_without_an_image_is_a_plain_chat():
    assert images_of(None) == images_of([]) == "What is it?"


def test_what_is_no_image_is_the_rows_error():
    assert images_of(7) == RowError("bad_image", "an image is int, expected a path, URL or bytes")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder that the job names, one that it does not, and links from one to the other."""
    root = tmp_path_factory.mktemp("images")
    for name in ("pics", "pics/deep", "pics-2", "secret"):
        (root / name).mkdir()
    (root / "pics/a b.png").write_bytes(b"cat")
    (root / "pics/deep/%2e.png").write_bytes(b"dog")
    for path in ("secret/s.png", "pics-2/s.png", "s.png"):
        (root / path).write_bytes(SECRET)
    (root / "pics/link.png").symlink_to(root / "secret/s.png")
    (root / "pics/folder").symlink_to(root / "secret")
    (root / "pics/loop").symlink_to(root / "pics/loop")
    (root / "pics/inside.png").symlink_to(root / "pics/a b.png")
    return root


NAMES = st.sampled_from(
    [
        *("a b.png", "a%20b.png", "s.png", "deep", "%2e.png", "%252e.png", "link.png", "folder"),
        *("loop", "inside.png", "secret", "pics", "pics-2"),
        *("..", "%2e%2e", ".", "", "~", "\0", "?", "#", "\\"),
    ]
)
STARTS = st.sampled_from(
    [
        *("", "/", "//", "file://", "file:///", "file:", "FILE://", "file://host", " ", "ROOT/"),
        *("PICS/", "file://ROOT/", "file://PICS/", "file://localhost/PICS/", "http://"),
        *("https://a.org/", "ftp://"),
    ]
)


@given(start=STARTS, names=st.lists(NAMES, max_size=6), is_message=st.booleans())
@example(start="PICS/", names=["a b.png"], is_message=True)
@example(start="file://PICS/", names=["..", "secret", "s.png"], is_message=True)
@example(start="", names=["folder", "s.png"], is_message=False)
def test_whatever_a_row_names_nothing_outside_the_folder_is_read(places, start, names, is_message):
    root = str(places)
    text = (start + "/".join(names)).replace("ROOT", root).replace("PICS", f"{root}/pics")
    pics = f"{root}/pics"
    if is_message:
        content = chat_of({"url": text}, images_folder=pics)
    else:
        content = images_of(text, images_folder=[pics])
    if isinstance(content, RowError):
        assert content.error_type == "bad_image"
        return
    try:
        read = with_local_images([{"role": "user", "content": content}])
    except (OSError, ValueError):  # Not there, or a folder.
        return
    assert base64.b64encode(SECRET).decode() not in str(read)


@pytest.mark.parametrize("name", ["a b.png", "inside.png", "deep/%2e.png", "./deep/../a b.png"])
def test_what_lies_below_the_folder_is_read_however_it_is_named(places, name):
    for text in (name, f"{places}/pics/{name}"):
        for content in (
            chat_of(text, images_folder=f"{places}/pics"),
            images_of(
                text,
                images_folder=["/nowhere", f"{places}/pics"]
                if text != name
                else [f"{places}/pics"],
            ),
        ):
            (read,) = with_local_images([{"role": "user", "content": content}])
            urls = [p["image_url"]["url"] for p in read["content"] if p["type"] == "image_url"]
            wanted = b"dog" if "%2e.png" in name else b"cat"
            assert urls == [f"data:image/png;base64,{base64.b64encode(wanted).decode()}"]


def test_messages_read_no_file_unless_the_job_names_a_folder(places):
    error = chat_of({"url": f"{places}/pics/a b.png"})
    assert error.error_type == "bad_image"
    assert error.error.endswith("is not below prompt.images_folder (not set)")
    data = {"url": "data:image/png;base64,AAAA"}
    assert chat_of(data)[1]["image_url"] == data


@pytest.mark.parametrize(
    ("url", "is_allowed"),
    [
        ("https://a.org/x.png", True),
        ("http://A.org:8080?x", True),
        ("https://a.org", True),
        ("https://b.a.org/x.png", False),
        ("https://a.org.evil.net/", False),
        ("https://a.org@evil.net/", False),
        ("https://evil.net\\@a.org/", False),
        ("https://evil.net/#a.org", False),
        ("http://169.254.169.254/latest/meta-data", False),
        ("http://[::1]/", False),
        ("https:///a.org/", False),
        ("ftp://a.org/x.png", False),
    ],
)
def test_addresses_are_those_of_hosts_that_the_job_names(url, is_allowed):
    for found in (chat_of(url, image_domains=["a.org"]), images_of(url, image_domains=["a.org"])):
        assert (not isinstance(found, RowError)) == is_allowed
        assert is_allowed or found.error_type == "bad_image"
    assert isinstance(chat_of(url), RowError)
    is_web = url.startswith("http")
    assert isinstance(chat_of(url, image_domains=["*"]), list) == is_web


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://a.org/"}},
        {"type": "input_image", "image_url": "http://a.org/"},
        {"type": "text", "text": "x", "uuid": "1", "image_url": "http://a.org/"},
        {"type": "image_embeds", "image_embeds": "x"},
        {"type": "image_url", "image_url": {"url": "data:,"}, "uuid": "of another row"},
        {"type": "image_url", "image_url": {"url": 7}},
        {"type": "image_url"},
        {"type": "image_url", "image_url": {"url": "data:,"}, "video_url": {"url": "http://a.org"}},
    ],
)
def test_other_ways_to_bring_media_are_that_rows_error(part):
    messages = [{"role": "user", "content": [part]}]
    builder = PromptBuilder(PromptConfig(messages="m", image_domains=["*"], images_folder="/"))
    error = builder.build({"m": messages})
    assert isinstance(error, RowError)
    assert error.error_type == "bad_image"


def test_parts_as_parquet_has_them_are_texts_and_images():
    parts = [
        {"type": "text", "text": "x", "image_url": None},
        {"type": "image_url", "text": None, "image_url": {"url": "data:,"}},
    ]
    messages = [{"role": "user", "content": parts}]
    assert PromptBuilder(PromptConfig(messages="m")).build({"m": messages}) == messages


STYLE = ChatStyle(None, {})


class Seeing:
    """Stands for vLLM's LLM of a vision model: opens images as that does."""

    class model_config:  # noqa: N801 - vLLM's
        is_multimodal_model = True

    def _preprocess_chat_one(self, messages, **_):
        url = messages[0]["content"][0]["image_url"]["url"]
        Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).load()
        return {"prompt_token_ids": [1]}


def rendered(url):
    part = {"type": "image_url", "image_url": {"url": str(url)}}
    return render_images(Seeing(), [{"role": "user", "content": [part]}], STYLE)


def test_a_file_that_is_too_large_or_never_ends_is_that_rows_error(tmp_path):
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate(images.MAX_IMAGE_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.png")
    for name, why in (("large.png", "larger than 32 MiB"), ("pipe.png", "no plain file")):
        error = rendered(tmp_path / name)
        assert error.error_type == "image_error"
        assert why in error.error
    assert "no plain file" in rendered("/dev/zero").error


def test_an_image_of_too_many_pixels_is_never_decoded(tmp_path):
    Image.new("1", (100, 100)).save(tmp_path / "small.png")
    assert rendered(tmp_path / "small.png") == {"prompt_token_ids": [1]}
    Image.MAX_IMAGE_PIXELS = None
    Image.new("1", (8192, 8193)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    bomb = tmp_path / "bomb.png"
    data = f"data:image/png;base64,{base64.b64encode(bomb.read_bytes()).decode()}"
    for url in (bomb, data):
        error = rendered(url)
        assert error.error_type == "image_error"
        assert "pixels" in error.error


VLLM_OWN = 'allowed_local_media_path = "/media"\nallowed_media_domains = ["a.org"]\n'


def test_the_job_file_names_folders(tmp_path):
    job = (
        '[input]\npath = "x.jsonl"\n[model]\nbackend = "echo"\n[sampling]\nmax_tokens = 1\n'
        '[output]\npath = "out"\n[prompt]\n'
    )
    path = tmp_path / "job.toml"

    def folders(prompt):
        path.write_text(job + prompt)
        return load_job(path).prompt.images_folder

    assert folders('messages = "m"') == []
    assert folders('user = "x"\nimages = "i"') == [str(tmp_path)]
    both = 'messages = "m"\nimages_folder = [".", "../pics"]'
    assert folders(both) == [str(tmp_path), str(tmp_path.parent / "pics")]
    path.write_text(
        job.replace("[sampling]", "[model.engine]\n" + VLLM_OWN + "[sampling]")
        + 'user = "x"\nimages = "i"\nimage_domains = ["b.org"]'
    )
    prompt = load_job(path).prompt
    assert prompt.images_folder == [str(tmp_path), "/media"]
    assert prompt.image_domains == ["b.org", "a.org"]
    with pytest.raises(ConfigError, match=r"images_folder.*a path or a list of paths"):
        folders('messages = "m"\nimages_folder = 7')
