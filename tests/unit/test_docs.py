"""The pages of docs/ link to what there is, and the drawn data flow is the declared one."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.run import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FLOW = ROOT / "docs" / "data-flow.svg"
SVG = "{http://www.w3.org/2000/svg}"


def anchors(page):
    """Headings as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def dead_links(path):
    """Relative links of a page that lead nowhere."""
    found = []
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            found.append(target)
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    assert dead_links(path) == []


def test_a_dead_link_would_be_found(tmp_path):
    page = tmp_path / "a.md"
    page.write_text("# One two\n[a](b.md) [b](#one-two) [c](#three) [d](https://example.org)")
    assert dead_links(page) == ["b.md", "#three"]


def test_every_page_is_reached_from_the_readme():
    reached, pending = set(), [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    while pending:
        path = pending.pop().resolve()
        if path in reached or not path.exists():
            continue
        reached.add(path)
        links = re.findall(r"\]\(([^)#\s:]+\.md)", path.read_text())
        pending += [path.parent / link for link in links]
    assert [path.name for path in PAGES if path.resolve() not in reached] == []


def test_the_drawing_shows_the_stages_and_what_each_reads():
    root = ElementTree.parse(FLOW).getroot()
    flows = [path for path in root.iter(f"{SVG}path") if path.get("data-from")]
    drawn = sorted((path.get("data-from"), path.get("data-to")) for path in flows)
    assert drawn == sorted((source, stage.name) for stage in STAGES for source in stage.reads)
    names = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "name"]
    assert sorted(names) == [f"{stage.number} {stage.name}" for stage in STAGES]
