"""The page in a browser: what stands in its URL is what the model is fed, hears and shows."""

import json

import numpy as np
import pytest
import soundfile
from moshi.utils.compile import no_compile

from pipeline.serving import wire
from pipeline.serving.limits import Limits
from pipeline.serving.model import ServedModel
from tests.stages.browser_helpers import (
    ARGUMENTS,
    CHROMIUM,
    IN_BROWSER,
    connect,
    in_browser,
)
from tests.stages.conftest import write_tiny_checkpoint
from tests.stages.serving_helpers import (
    LONG,
    PROMPT,
    free_port,
    in_loop,
    ready,
    serving,
    session_at,
    user_pcm,
)

TOKEN = "s&cret-token"
PERSONAS = (
    {"id": "marcus", "name": "Marcus", "text_prompt": PROMPT},
    {"id": "ann", "name": "Ann", "text_prompt": "You are Ann & you want a “flat white” ☕."},
)

pytestmark = IN_BROWSER


def test_a_server_that_still_loads_its_model_is_waited_for(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        left = 2

        async def loading(route):
            nonlocal left
            left -= 1
            if left < 0:
                await route.continue_()
            else:
                await route.fulfill(status=503, body="the model is being loaded; see /ready")

        await page.route("**/api/info", loading)
        await page.goto(wire.page_url(url, PROMPT))
        await expect(page.locator(".state")).to_have_text("The model is being loaded …")
        await expect(page.locator("#model")).to_contain_text("at a time", timeout=20_000)
        await expect(page.locator(".state")).to_have_text("Not connected.")

    complaints = in_browser(tiny_speaker, look)
    assert complaints and all("503" in one for one in complaints)


def test_the_prompt_of_its_url_is_shown_and_fed(tiny_speaker):
    from playwright.async_api import expect

    prompt = PROMPT + " <b>bold</b>\nsecond line"
    count = len(wire.prompt_tokens(tiny_speaker.tokenizer, prompt))

    async def look(page, url):
        await page.goto(wire.page_url(url, prompt))
        await expect(page.locator("#prompt")).to_have_value(prompt)
        await expect(page.locator(".state")).to_have_text("Not connected.")
        for button in ("#talk", "#listen"):
            await connect(page, button)
            await expect(page.locator(".proof")).to_contain_text(f"fed {count} tokens")
            await expect(page.locator(".lag")).to_contain_text("behind")
            await expect(page.locator(".transcript")).not_to_be_empty()
            await page.click("#stop")
            await expect(page.locator(".state")).to_have_text("Stopped.")

    assert in_browser(tiny_speaker, look) == []


def test_two_thousand_characters_of_prompt_arrive_whole(tiny_speaker):
    from playwright.async_api import expect

    count = len(wire.prompt_tokens(tiny_speaker.tokenizer, LONG))

    async def look(page, url):
        await page.goto(wire.page_url(url, LONG))
        await connect(page)
        await expect(page.locator(".proof")).to_contain_text(f"fed {count} tokens")

    assert len(LONG) == 2000 and in_browser(tiny_speaker, look) == []


def test_what_is_written_into_the_form_is_what_is_fed(tiny_speaker):
    """Persona, prompt, sampling and seed of the form, not of the URL."""
    from playwright.async_api import expect

    count = len(wire.prompt_tokens(tiny_speaker.tokenizer, PERSONAS[1]["text_prompt"]))

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + "&seed=3")
        await expect(page.locator("#persona")).to_have_value("marcus")
        await page.select_option("#persona", "ann")
        await expect(page.locator("#prompt")).to_have_value(PERSONAS[1]["text_prompt"])
        await page.click("summary")
        await expect(page.locator("#seed")).to_have_value("3")
        await page.fill("#seed", "77")
        await page.fill("#text_temperature", "0.3")
        await connect(page)
        await expect(page.locator(".proof")).to_contain_text(f"fed {count} tokens")
        await expect(page.locator(".proof")).to_contain_text("seed 77")

    assert in_browser(tiny_speaker, look, personas=PERSONAS) == []


class Polite(ServedModel):
    """Answers with a tone, half a second after its user has fallen silent."""

    def step(self, heard):
        said = super().step(heard)
        ((slot, frame),) = heard.items()
        self.quiet = 0 if np.abs(frame).max() > 0.05 else getattr(self, "quiet", 99) + 1
        audible = 6 < self.quiet < 14
        return {slot: (0.5 * user_pcm(1) if audible else np.zeros(1920, np.float32), said[slot][1])}


@pytest.mark.parametrize("audio_format", ["opus", pytest.param("pcm", marks=pytest.mark.slow)])
def test_it_hears_a_microphone_answers_and_measures(tiny_checkpoint, tmp_path, audio_format):
    """A WAV as microphone: what is saved holds it on the right, and the model on the left."""
    from playwright.async_api import expect

    beep = np.concatenate([user_pcm(12), np.zeros(25 * 1920, np.float32)])
    soundfile.write(tmp_path / "mic.wav", beep, 24_000)
    saved = {}

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + f"&seed=3&format={audio_format}")
        await page.click("summary")
        await expect(page.locator("#format")).to_have_value(audio_format)
        await connect(page, "#talk")
        await expect(page.locator(".lag")).to_contain_text("answers after", timeout=20_000)
        await page.wait_for_timeout(1500)
        await page.click("#stop")
        found = []
        page.on("download", lambda download: found.append(download))
        await page.click("#save")
        await page.wait_for_timeout(800)
        for download in found:
            path = tmp_path / download.suggested_filename
            await download.save_as(path)
            saved[path.suffix] = path

    polite = Polite.load(tiny_checkpoint, "cpu")
    assert in_browser(polite, look, microphone=tmp_path / "mic.wav") == []
    sound, rate = soundfile.read(saved[".wav"])
    record = json.loads(saved[".json"].read_text())
    assert rate == 24_000 and sound.shape[1] == 2
    assert np.abs(sound[:, 0]).max() > 0.01 and np.abs(sound[:, 1]).max() > 0.1
    assert record["text_prompt"] == PROMPT and record["seed"] == 3
    # Half a second, and what the browser's own echo cancellation and an encoder add or take.
    assert record["delays_s"] and all(0.2 < delay < 1.1 for delay in record["delays_s"])
    assert record["words"] and record["prompt_digest"]


def test_it_says_why_it_was_refused(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        await page.goto(f"{url}/?text_prompt=Salt & Straw&seed=x")
        await page.click("#listen")
        await expect(page.locator(".state")).to_contain_text("%26")
        await expect(page.locator(".state")).to_contain_text("seed")
        await page.goto(f"{url}/?text_prompt=Hello")
        async with session_at(url, format="pcm") as ws:
            await ready(ws)
            await page.click("#listen")
            await expect(page.locator(".state")).to_contain_text("busy")

    faults = in_browser(tiny_speaker, look)
    assert all("400" in fault for fault in faults)  # what the browser says of the refusal itself


def test_values_of_the_url_that_the_server_takes_start_a_conversation(tiny_speaker):
    """Fields in a folded part of the form, of which a browser would refuse some without a word."""

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + "&text_temperature=0.72&audio_temperature=.33")
        await connect(page)

    assert in_browser(tiny_speaker, look) == []


def test_a_hash_that_cuts_the_prompt_is_told_and_nothing_begins_until_it_is_mended(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        await page.goto(f"{url}/?text_prompt=You are%20number #1 of all")
        state = page.locator(".state")
        await expect(state).to_contain_text("must be written %23")
        await page.click("#talk")
        await expect(state).to_contain_text("must be written %23")
        await page.fill("#prompt", "You are number #1 of all")
        await connect(page)

    assert in_browser(tiny_speaker, look) == []


def test_it_says_when_and_why_a_conversation_is_over(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT))
        await connect(page)
        await expect(page.locator(".state")).to_contain_text("over: a conversation lasts 1 s")
        await expect(page.locator("#talk")).to_be_enabled()
        await connect(page)  # and another can begin

    assert in_browser(tiny_speaker, look, limits=Limits(session_s=1)) == []


def test_a_token_becomes_a_cookie_and_an_owner_makes_a_link_for_a_trainee(tiny_speaker):
    from playwright.async_api import expect

    count = len(wire.prompt_tokens(tiny_speaker.tokenizer, PROMPT))

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + "&token=" + wire.quote(TOKEN))
        assert "cret" not in page.url and "text_prompt" in page.url
        assert "cret" not in await page.evaluate("document.cookie")
        await connect(page)
        await page.click("#stop")
        await page.click("#share summary")
        await page.fill("#link-name", "Marcus at rush hour")
        await page.click("#make-link")
        await expect(page.locator("#link")).to_contain_text("?pass=")
        link = await page.locator("#link").text_content()
        trainee = await (await page.context.browser.new_context()).new_page()
        await trainee.goto(link)
        assert "pass" not in trainee.url
        await expect(trainee.locator("#practice")).to_contain_text("Marcus at rush hour waits")
        await expect(trainee.locator("#own")).to_be_hidden()
        assert "Sunrise" not in await trainee.content()
        await connect(trainee)
        await expect(trainee.locator(".proof")).to_contain_text(f"fed {count} tokens")

    assert in_browser(tiny_speaker, look, token=TOKEN) == []


def test_keyboard_alone_and_a_phones_screen_are_enough(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT))
        await expect(page.locator("#model")).to_contain_text("duplex-workbench")
        wide = await page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 390  # nothing hangs over the edge
        await page.focus("#prompt")
        for _ in range(10):
            await page.keyboard.press("Tab")
            if await page.evaluate("document.activeElement.id") == "talk":
                break
        await page.keyboard.press("Enter")
        await expect(page.locator(".state")).to_contain_text("Connected", timeout=20_000)
        await page.keyboard.press("Shift+Tab")
        await page.focus("#stop")
        await page.keyboard.press("Space")
        await expect(page.locator(".state")).to_have_text("Stopped.")

    assert in_browser(tiny_speaker, look, phone=True) == []


def test_two_servers_stand_side_by_side_and_hear_the_same(tiny_speaker, tmp_path):
    """The second one is another origin: it must name the first as its friend."""
    from playwright.async_api import async_playwright, expect

    async def both(url):
        async with (
            serving(other, port, friends=(url,)) as second,
            async_playwright() as playwright,
        ):
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=[*ARGUMENTS])
            page = await browser.new_page()
            await page.goto(wire.page_url(url, PROMPT) + "&seed=3&with=" + second)
            await page.click("#talk")
            for pane in (0, 1):
                root = page.locator(".pane").nth(pane)
                await expect(root.locator(".state")).to_contain_text("Connected", timeout=20_000)
                await expect(root.locator(".proof")).to_contain_text("seed 3")
                await expect(root.locator(".title")).to_contain_text(
                    (tiny_speaker, other)[pane].model_digest[:12]
                )
            await expect(page.locator(".transcript").nth(1)).not_to_be_empty()
            await page.click("#stop")
            await browser.close()

    other = ServedModel.load(write_tiny_checkpoint(tmp_path / "other", lm_seed=8), "cpu")
    port = free_port()
    # Two models' threads in one process, as no server has: moshi's switch is one for all threads,
    # and who leaves it first would make the other compile for half a minute.
    with no_compile():
        in_loop(tiny_speaker, both, friends=(f"http://127.0.0.1:{port}",))


def test_a_link_cannot_send_what_is_said_to_a_stranger(tiny_speaker, tmp_path):
    from playwright.async_api import expect

    heard = []

    async def look(page, url):
        page.on("websocket", lambda ws: heard.append(ws.url))
        await page.goto(wire.page_url(url, PROMPT) + "&with=https://evil.example")
        await expect(page.locator(".state")).to_contain_text("does not know https://evil.example")
        assert await page.locator(".pane").count() == 1
        await connect(page)

    assert in_browser(tiny_speaker, look) == []
    assert heard and all(address.startswith("ws://127.0.0.1") for address in heard)
