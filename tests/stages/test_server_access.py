"""Who gets in: token, cookie, pass, origin; and what a server keeps and gives."""

import asyncio
import base64
import json
import re
import time

import aiohttp
import pytest
from yarl import URL

from duplex.errors import RequestError
from duplex.files import read_lines
from pipeline.serving import wire
from pipeline.serving.access import Access, Denied
from pipeline.serving.grades import GradeBook
from pipeline.serving.links import LinkBook
from tests.stages.serving_helpers import PROMPT, in_loop, lock_step, ready

TOKEN = "s&cret-token"
TOKEN_COOKIE, PASS_COOKIE = Access(TOKEN).token_cookie, Access(TOKEN).pass_cookie
OWNER = {"Authorization": f"Bearer {TOKEN}"}


def client(cookies=None):
    jar = aiohttp.CookieJar(unsafe=True)  # as a browser: cookies of an IP address too
    return aiohttp.ClientSession(cookie_jar=jar, cookies=cookies)


async def status_of(session, url, **options):
    async with session.get(URL(url, encoded=True), **options) as response:
        return response.status


def test_a_token_in_the_pages_url_becomes_a_cookie_and_leaves_the_url(tiny_speaker):
    async def talk(url):
        page = wire.page_url(url, PROMPT) + "&token=" + wire.quote(TOKEN)
        async with client() as session:
            target = URL(page, encoded=True)
            async with session.get(target, allow_redirects=False) as response:
                cookie = response.cookies[TOKEN_COOKIE]
                assert response.status == 303
                assert cookie["httponly"] and cookie["samesite"] == "Strict"
                there = response.headers["Location"]
            assert "token" not in there
            async with session.get(target) as response:  # followed, with the cookie
                assert response.status == 200 and "token" not in str(response.url)
                assert dict(response.url.query) == {"text_prompt": PROMPT}
                assert "<script" in await response.text()
            assert await status_of(session, f"{url}/api/info") == 200
            async with session.ws_connect(URL(wire.chat_url(url, format="pcm"))) as ws:
                await ready(ws)
                assert len(await lock_step(ws, 2)) == 2
            # The cookie is the browser's, whichever page asks: another site's is refused.
            for origin, expected in (("https://evil.example", 403), (url, 200)):
                found = await status_of(session, f"{url}/api/info", headers={"Origin": origin})
                assert found == expected, origin
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await session.ws_connect(wire.chat_url(url), origin="https://evil.example")

    in_loop(tiny_speaker, talk, token=TOKEN)


def test_a_wrong_token_is_refused_everywhere_and_a_right_one_from_any_page(tiny_speaker):
    async def talk(url):
        async with client() as session:
            for path in ("/", "/api/info", "/metrics", "/static/main.js"):
                assert await status_of(session, f"{url}{path}") == 401
                assert await status_of(session, f"{url}{path}?token=wrong") == 401
        async with client({TOKEN_COOKIE: "wrong"}) as session:
            assert await status_of(session, f"{url}/api/info") == 401
        async with client() as session:  # a stock client, or another site that was given it
            chat = wire.chat_url(url, format="pcm", token=TOKEN)
            target = URL(chat, encoded=True)
            async with session.ws_connect(target, origin="https://moshi.example") as ws:
                await ready(ws)

    in_loop(tiny_speaker, talk, token=TOKEN)


def test_a_trainees_link_has_its_prompt_hides_it_and_ends(tiny_speaker, tmp_path):
    async def talk(url):
        async with client() as owner:
            link = {"name": "Marcus", "text_prompt": PROMPT, "hours": 2}
            async with owner.post(f"{url}/api/links", json=link, headers=OWNER) as response:
                assert response.status == 200
                path = (await response.json())["path"]
        # Nothing of the prompt is in it, however it is read; and a browser keeps it as a cookie.
        assert len(path) < 100
        for part in path.replace("=", ".").split("."):
            read = base64.urlsafe_b64decode(re.sub(r"[^\w-]", "", part) + "==")
            assert b"Sunrise" not in read and b"Marcus" not in read
        async with client() as trainee:
            async with trainee.get(URL(url + path, encoded=True)) as response:
                assert response.status == 200 and "pass" not in str(response.url)
            async with trainee.get(f"{url}/api/info") as response:
                info = await response.json()
            assert info["visitor"] == "trainee" and info["pass"]["name"] == "Marcus"
            assert "Sunrise" not in json.dumps(info) and "personas" not in info
            async with trainee.ws_connect(wire.chat_url(url, format="pcm")) as ws:
                fed = await ready(ws)
            tokens = wire.prompt_tokens(tiny_speaker.tokenizer, PROMPT)
            assert fed["digest"] == wire.prompt_digest(tokens)
            # Nothing else: no other prompt, no list, no link of their own.
            assert await status_of(trainee, f"{url}/api/chat?text_prompt=You+are+Eve") == 400
            for path in ("/metrics", "/api/tokenizer"):
                assert await status_of(trainee, url + path) == 403
            for path in ("/api/links", "/api/prompts"):
                async with trainee.post(url + path, json=link) as response:
                    assert response.status == 403
            async with trainee.post(f"{url}/api/grades", json=grade(text_prompt="x")) as response:
                assert response.status == 200
        for bad in (path.partition("=")[2][:-2] + "AA", "", "a.b", "\x00", "\udcff"):
            async with client({PASS_COOKIE: bad}) as session:
                assert await status_of(session, f"{url}/api/info") == 401, bad

    in_loop(tiny_speaker, talk, token=TOKEN, grades=tmp_path / "grades.jsonl")
    (kept,) = read_lines(tmp_path / "grades.jsonl")
    assert kept["persona"] == "Marcus" and kept["grade"] == "good"
    assert kept["text_prompt"] == PROMPT  # of the link: the trainee's page does not know it


def test_no_link_without_a_token_and_none_for_nonsense(tiny_speaker):
    async def post(url, body, **options):
        async with client() as session, session.post(url, json=body, **options) as response:
            return response.status, await response.text()

    async def local(url):
        return await post(f"{url}/api/links", {"name": "M", "text_prompt": "Hi."})

    status, text = in_loop(tiny_speaker, local)
    assert status == 400 and "DUPLEX_TOKEN" in text

    async def owner(url):
        bodies = [
            {"name": "", "text_prompt": "Hi."},
            {"name": "M", "hours": 1},
            {"name": "M", "text_prompt": "Hi.", "hours": 0},
            {"name": "M", "text_prompt": "Hi.", "hours": float("inf")},
            {"name": "M", "text_prompt": "Hi.", "hours": "x"},
            {"name": "M", "text_prompt": "Hi.", "hours": 10**400},
            {"name": "M", "text_prompt": None},
            {"name": "\ud800"},
            {"name": "M", "voice_prompt": "../x"},
            {"name": "M", "text_prompt": "coffee " * 5000},
            [],
        ]
        return [await post(f"{url}/api/links", body, headers=OWNER) for body in bodies]

    for status, text in in_loop(tiny_speaker, owner, token=TOKEN):
        assert status in (400, 413) and text


def test_links_outlive_a_start_and_end_by_themselves(tmp_path, monkeypatch):
    path = tmp_path / "run" / "links.jsonl"
    link = LinkBook(path).add("M", "You are M ☕.", "", "", 1)
    assert link not in path.read_text() and link[:10] not in path.read_text()
    again = LinkBook(path)
    found = again.find(link)
    assert found is not None and found.text_prompt == "You are M ☕."
    assert again.find(link[:-1]) is None and again.find("") is None
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    assert again.find(link) is None and LinkBook(path).find(link) is None


def test_who_removes_a_link_from_the_file_ends_it_at_once(tmp_path):
    path = tmp_path / "links.jsonl"
    book = LinkBook(path)
    first, second = (book.add(name, "You are M.", "", "", 1) for name in ("A", "B"))
    assert book.find(first) is not None and book.find(second) is not None
    path.write_text(path.read_text().splitlines(keepends=True)[1])
    assert book.find(first) is None and book.find(second) is not None
    path.unlink()
    assert book.find(second) is None
    third = book.add("C", "You are M.", "", "", 1)
    assert book.find(third) is not None and book.find(second) is None


def test_a_line_that_is_no_link_opens_nothing_and_harms_no_other(tmp_path, caplog):
    path = tmp_path / "links.jsonl"
    link = LinkBook(path).add("A", "You are M.", "", "", 1)
    good = path.read_text()
    late = json.dumps(json.loads(good) | {"expires": "x"})
    for odd in ('{"x": 1}', late, '{"link": "a", "name": 3}'):
        path.write_text(f"{odd}\n{good}")
        assert LinkBook(path).find(link) is not None, odd
        assert "a line is no link" in caplog.text
        caplog.clear()


def test_what_has_ended_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "links.jsonl"
    book = LinkBook(path)
    book.add("A", "You are M.", "", "", 1)
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    link = book.add("B", "You are M.", "", "", 1)
    assert [line["name"] for line in read_lines(path)] == ["B"] and book.find(link) is not None


def test_a_link_ends_the_conversation_that_it_began(tiny_speaker):
    async def talk(url):
        body = {"name": "M", "text_prompt": "You are M.", "hours": 4 / 3600}
        async with client() as session:
            async with session.post(f"{url}/api/links", json=body, headers=OWNER) as response:
                link = (await response.json())["pass"]
            chat = f"{url}/api/chat?format=pcm&pass={link}"
            async with session.ws_connect(chat) as socket:
                said = [message.data async for message in socket]
            return said, socket.close_code

    said, code = in_loop(tiny_speaker, talk, token=TOKEN)
    notes = [json.loads(one[1:]) for one in said if one[0] == wire.Kind.METADATA]
    assert notes[-1]["type"] == "end" and notes[-1]["reason"] == "time", notes
    assert code == wire.CLOSE_DONE


def test_a_token_of_any_bytes_is_wrong_and_not_an_error():
    access = Access(TOKEN)
    for shown in ("\udcff", "☕", "x" * 10_000):
        with pytest.raises(Denied):
            access.visitor({"Authorization": f"Bearer {shown}"}, {}, {})
        with pytest.raises(Denied):
            access.visitor({}, {}, {access.token_cookie: shown})


def test_cookies_of_two_servers_of_one_host_do_not_meet():
    assert Access("token one").token_cookie != Access("token two").token_cookie


def test_on_loopback_only_its_own_page_and_its_own_name(tiny_speaker):
    async def talk(url):
        port = URL(url).port
        asked = {
            "own page": {"Origin": url},
            "no browser": {},
            "other site": {"Origin": "https://evil.example"},
            "other port": {"Origin": f"http://127.0.0.1:{(port or 0) + 1}"},
            "rebound name": {"Host": f"evil.example:{port}"},
            "null": {"Origin": "null"},
        }
        async with client() as session:
            return {
                name: await status_of(session, f"{url}/api/info", headers=headers)
                for name, headers in asked.items()
            }

    found = in_loop(tiny_speaker, talk)
    assert {name for name, status in found.items() if status == 200} == {"own page", "no browser"}
    assert set(found.values()) == {200, 403}


def test_a_long_prompt_gets_an_id_for_its_url(tiny_speaker):
    text = "You are the owner of Lösch & Söhne ☕. " * 40

    async def talk(url):
        async with client() as session:
            async with session.post(f"{url}/api/prompts", json={"text_prompt": text}) as response:
                name = (await response.json())["prompt_id"]
            async with session.ws_connect(wire.chat_url(url, prompt_id=name, format="pcm")) as ws:
                fed = await ready(ws)
            both = f"{url}/api/chat?prompt_id={name}&text_prompt=Hi"
            statuses = [await status_of(session, u) for u in (both, f"{url}/api/chat?prompt_id=x")]
            async with session.post(f"{url}/api/prompts", json={"text_prompt": " "}) as response:
                statuses.append(response.status)
            return fed, statuses

    fed, statuses = in_loop(tiny_speaker, talk)
    tokens = wire.prompt_tokens(tiny_speaker.tokenizer, text)
    assert fed["digest"] == wire.prompt_digest(tokens)
    assert statuses == [400, 400, 400]


# -- grades, metrics


def grade(**changes):
    words = [{"start_s": 1.2, "text": "Finally. A flat white."}]
    return {"grade": "good", "seconds": 12.4, "words": words, "delays_s": [0.4], **changes}


def test_grades_are_kept_with_the_model_and_refused_when_they_are_none(tmp_path):
    path = tmp_path / "run" / "grades.jsonl"
    book = GradeBook(path)
    book.add(grade(note="said “thank you” twice ☕", persona="marcus", seed=4), "d" * 64, "merged")
    book.add(grade(grade="poor"), "d" * 64, "base")
    first, second = read_lines(path)
    assert first["note"].endswith("☕") and first["model_digest"] == "d" * 64
    assert (second["grade"], second["label"]) == ("poor", "base")
    for bad in (
        grade(grade="great"), grade(seconds=-1), grade(note="x" * 3000), grade(extra=1),
        grade(prompt_digest="../../etc"), {}, grade(words=[{"start_s": "x", "text": 1}]),
        grade(text_prompt="x" * 30_000), grade(heard=[{"start_s": 1, "text": "x" * 5000}]),
        grade(heard=[{"start_s": 1, "text": "hi", "audio": "…"}]),
    ):  # fmt: skip
        with pytest.raises(RequestError):
            book.add(bad, "d" * 64, "merged")
    assert len(list(read_lines(path))) == 2


def test_a_server_without_a_file_for_grades_says_so(tiny_speaker):
    async def talk(url):
        async with client() as session, session.post(f"{url}/api/grades", json=grade()) as response:
            return response.status, await response.text()

    status, text = in_loop(tiny_speaker, talk)
    assert status == 400 and "--grades" in text


def test_metrics_count_what_happened_and_name_nobody(tiny_speaker):
    async def talk(url):
        async with client() as session:
            chat = wire.chat_url(url, text_prompt=PROMPT, format="pcm", token=TOKEN)
            for _ in range(2):
                async with session.ws_connect(URL(chat, encoded=True)) as ws:
                    await ready(ws)
                    await lock_step(ws, 3)
                await asyncio.sleep(0.05)
            await status_of(session, f"{url}/api/info")
            async with session.get(f"{url}/metrics", headers=OWNER) as response:
                return await response.text()

    text = in_loop(tiny_speaker, talk, token=TOKEN)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines["duplex_frames_total"]) == 6
    assert float(lines['duplex_conversations_total{reason="left"}']) == 2
    assert float(lines['duplex_requests_refused_total{status="401"}']) == 1
    assert float(lines["duplex_slots_taken"]) == 0
    assert float(lines["duplex_step_seconds_count"]) == 6
    assert "Sunrise" not in text and "cret" not in text
