"""The wire format without a model: queries, URLs, audio, digests."""

import hashlib
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from duplex.config import SamplingSection
from duplex.errors import RequestError
from pipeline.serving import wire
from pipeline.serving.wire import ChatRequest, Kind

AWKWARD = "Salt & Straw + \"quotes\" 'x' #1 100% a=b; ☕ 你好\nsecond line"


def parse(url, **options):
    """As the server reads it: aiohttp decodes the query through yarl."""
    return wire.parse_chat_request(URL(url, encoded=True).query.items(), **options)


def test_a_query_without_keys_has_the_schemas_defaults():
    assert wire.parse_chat_request([]) == ChatRequest()
    assert ChatRequest().sampling == SamplingSection()
    own = SamplingSection(text_topk=3)
    assert wire.parse_chat_request([], own).sampling == own


def test_every_key_is_read_and_unknown_ones_are_ignored():
    request = parse(
        "ws://h/api/chat?text_prompt=hello%20there&voice_prompt=NATF0.pt&seed=7&text_temperature=0"
        "&audio_temperature=.5&text_topk=1&audio_topk=50&format=pcm&pad_mult=0&token=s"
    )
    sampling = SamplingSection(
        text_temperature=0, audio_temperature=0.5, text_topk=1, audio_topk=50
    )
    assert request == ChatRequest("hello there", "NATF0.pt", 7, sampling, "pcm")


@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("seed=x", "seed"),
        ("seed=-2", "seed"),
        ("seed=9223372036854775808", "seed"),
        ("text_temperature=nan", "text_temperature"),
        ("text_temperature=inf", "text_temperature"),
        ("audio_temperature=-1", "audio_temperature"),
        ("audio_temperature=5.1", "audio_temperature"),
        ("text_topk=0", "text_topk"),
        ("audio_topk=2.5", "audio_topk"),
        ("format=mp3", "format"),
        ("voice_prompt=../../etc/passwd", "voice_prompt"),
        ("voice_prompt=.hidden", "voice_prompt"),
        ("text_prompt=a&text_prompt=b", "text_prompt"),
    ],
)
def test_a_bad_value_is_refused_by_name(query, named):
    with pytest.raises(RequestError, match=named):
        parse(f"ws://h/api/chat?{query}")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("prompt", "text_prompt"),
        ("System_Prompt", "text_prompt"),
        ("Text_Prompt", "text_prompt"),
        ("voice", "voice_prompt"),
        ("temperature", "text_temperature or audio_temperature"),
        ("top_k", "text_topk or audio_topk"),
    ],
)
def test_a_key_that_means_another_is_refused_with_that_one(key, meant):
    with pytest.raises(RequestError, match=f"{key} is not known; did you mean {meant}"):
        parse(f"ws://h/api/chat?{key}=x")


def test_all_faults_are_told_at_once():
    with pytest.raises(RequestError) as caught:
        parse("ws://h/?seed=x&text_topk=0&format=mp3")
    assert all(key in str(caught.value) for key in ("seed", "text_topk", "format"))


@pytest.mark.parametrize("query", ["text_prompt=Salt & Straw", "text_prompt=R%26D at R&D"])
def test_a_bare_ampersand_does_not_cut_a_prompt_in_silence(query):
    with pytest.raises(RequestError, match="%26"):
        wire.parse_chat_request(wire.query_pairs(f"http://h/?{query}"))


def test_a_bare_hash_does_not_cut_a_prompt_in_silence():
    with pytest.raises(RequestError, match="%23"):
        wire.chat_url("http://h:1/?text_prompt=order #4 is late")


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200))
def test_a_prompt_survives_page_url_chat_url_and_query(prompt):
    page = wire.page_url("http://127.0.0.1:8998", prompt)
    assert parse(wire.chat_url(page)).text_prompt == prompt.strip()


def test_an_awkward_prompt_survives():
    page = wire.page_url("http://127.0.0.1:8998/", AWKWARD)
    assert page.isascii()
    assert parse(wire.chat_url(page)).text_prompt == AWKWARD


@pytest.mark.parametrize(
    ("url", "chat"),
    [
        ("http://h:1", "ws://h:1/api/chat"),
        ("http://h:1/", "ws://h:1/api/chat"),
        ("h:1", "ws://h:1/api/chat"),
        ("https://h/?text_prompt=a%20b&seed=3", "wss://h/api/chat?text_prompt=a%20b&seed=3"),
        ("https://h/pod/?seed=3", "wss://h/pod/api/chat?seed=3"),
        ("ws://h:1/api/chat?text_prompt=a+b", "ws://h:1/api/chat?text_prompt=a%20b"),
        ("wss://h/api/chat/", "wss://h/api/chat"),
    ],
)
def test_chat_url(url, chat):
    assert wire.chat_url(url) == chat
    assert wire.chat_url(wire.chat_url(url)) == chat
    assert wire.base_url(chat) == wire.base_url(url)


def test_chat_url_changes_replace_what_the_query_says():
    url = wire.chat_url("http://h:1/?seed=1&text_prompt=x", seed=2, format="pcm")
    assert url == "ws://h:1/api/chat?text_prompt=x&seed=2&format=pcm"


@pytest.mark.parametrize("url", ["ftp://h/", "http://", "file:///etc/passwd"])
def test_what_is_no_server_is_refused(url):
    with pytest.raises(RequestError, match="http"):
        wire.chat_url(url)


def test_a_prompt_is_tokenized_between_its_tags_and_an_empty_one_is_nothing():
    class Letters:
        def encode(self, text):
            return [ord(letter) for letter in text]

    found = wire.prompt_tokens(Letters(), " Be kind. ")
    assert "".join(map(chr, found)) == "<system> Be kind. <system>"
    assert wire.prompt_tokens(Letters(), " \n") == []


def test_digest_is_of_int32_little_endian_ids():
    expected = hashlib.sha256(struct.pack("<3i", 5, 70000, -1)).hexdigest()
    assert wire.prompt_digest([5, 70000, -1]) == expected
    assert wire.prompt_digest(np.array([[5], [70000], [-1]])) == expected
    assert wire.prompt_digest([]) == hashlib.sha256(b"").hexdigest()


def test_pcm_comes_back_and_clips():
    pcm = np.array([0, 0.5, -0.5, 1, -1, 3, -3], dtype=np.float32)
    back = wire.pcm_samples(wire.pcm_bytes(pcm))
    assert back.dtype == np.float32
    assert np.abs(back - np.clip(pcm, -1, 1)).max() < 1e-4


def test_a_message_begins_with_its_kind():
    assert wire.message(Kind.TEXT, b"hi") == b"\x02hi"
    assert wire.message(Kind.READY) == b"\x00"


def test_wire_imports_no_torch():
    code = "import sys, pipeline.serving.wire, pipeline.serve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
