"""The page in a browser: what stands in its URL is what the model is fed and what it shows."""

from pathlib import Path

import pytest

from pipeline.serving import wire
from tests.stages.serving_helpers import PROMPT, in_loop, ready, session_at

CHROMIUM = Path("/usr/bin/chromium-headless-shell")
ARGUMENTS = (
    "--no-sandbox",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium-headless-shell"),
]


def in_browser(speaker, look, **options):
    """Run `look(page, url)`; returns the page's errors, and what it loads from elsewhere."""
    from playwright.async_api import async_playwright

    async def talk(url):
        faults = []
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(
                executable_path=CHROMIUM, args=list(ARGUMENTS)
            )
            page = await browser.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on(
                "request",
                lambda r: faults.append(r.url) if not r.url.startswith((url, "data:")) else None,
            )
            await look(page, url)
            await browser.close()
        return faults

    return in_loop(speaker, talk, **options)


def test_the_prompt_of_its_url_is_shown_and_fed(tiny_speaker):
    from playwright.async_api import expect

    prompt = PROMPT + " <b>bold</b>\nsecond line"
    count = len(wire.prompt_tokens(tiny_speaker.tokenizer, prompt))

    async def look(page, url):
        await page.goto(wire.page_url(url, prompt))
        await expect(page.locator("#prompt")).to_have_value(prompt)
        await expect(page.locator(".state")).to_have_text("Not connected.")
        for button in ("#talk", "#listen"):
            await page.click(button)
            await expect(page.locator(".state")).to_contain_text("Connected", timeout=20_000)
            await expect(page.locator(".proof")).to_contain_text(f"fed {count} tokens")
            await expect(page.locator(".lag")).to_contain_text("behind")
            await expect(page.locator(".transcript")).not_to_be_empty()
            await page.click("#stop")
            await expect(page.locator(".state")).to_have_text("Stopped.")

    assert in_browser(tiny_speaker, look) == []


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

    assert in_browser(tiny_speaker, look) == []


def test_a_token_works_and_leaves_the_address_bar(tiny_speaker):
    from playwright.async_api import expect

    async def look(page, url):
        await page.goto(wire.page_url(url, PROMPT) + "&token=s%26cret")
        assert "cret" not in page.url and "text_prompt" in page.url
        await page.click("#listen")
        await expect(page.locator(".state")).to_contain_text("Connected", timeout=20_000)

    assert in_browser(tiny_speaker, look, token="s&cret") == []
