"""The server's page, driven in a headless browser."""

from pathlib import Path

import pytest

from tests.stages.serving_helpers import in_loop

CHROMIUM = Path("/usr/bin/chromium-headless-shell")
ARGUMENTS = (
    "--no-sandbox",
    "--autoplay-policy=no-user-gesture-required",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)
# A system package, which no `make setup` can install; where it is missing the run counts these
# tests as skipped, and the page's server side is tested all the same (test_server*.py,
# test_people.py).
IN_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs chromium-headless-shell"),
]


def in_browser(speaker, look, *, microphone=None, phone=False, **options):
    """Run `look(page, url)`; returns the page's errors, and what it loads from elsewhere.

    Args:
        microphone: a WAV file that is heard over and over.
    """
    from playwright.async_api import async_playwright

    arguments = [*ARGUMENTS]
    if microphone is not None:
        arguments.append(f"--use-file-for-fake-audio-capture={microphone}")

    async def talk(url):
        faults = []
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
            size = {"width": 390, "height": 844} if phone else {"width": 1200, "height": 900}
            context = await browser.new_context(viewport=size, has_touch=phone)
            page = await context.new_page()
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("console", lambda m: faults.append(m.text) if m.type == "error" else None)
            page.on(
                "request",
                lambda r: faults.append(r.url) if not r.url.startswith((url, "data:")) else None,
            )
            await look(page, url)
            await browser.close()
        return faults

    return in_loop(speaker, talk, **options)


async def connect(page, button="#listen"):
    from playwright.async_api import expect

    await page.click(button)
    await expect(page.locator(".state")).to_contain_text("Connected", timeout=20_000)
