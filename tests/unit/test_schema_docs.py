"""docs/records.md and docs/config.md say what the schema says, all of it."""

import re

import pytest

from duplex.characters import Persona
from duplex.config import Config, TensorsSection
from duplex.config_data import SpeechSection, TimelineSection, VoicesSection
from duplex.records import RECORD_TYPES, Dialogue, Turn, Voice
from duplex.sections import Runtime, Section
from pipeline.schema_docs import CHECKOUT, PAGES, config_page, main, records_page, type_of


def tables(page):
    """Heading -> field -> cells of its row."""
    found = {}
    for block in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        heading, _, rest = block.partition("\n")
        rows = re.findall(r"^\| `([^`]+)` \| (.*) \| (.*) \| (.*) \|$", rest, flags=re.MULTILINE)
        found[heading.strip("`")] = {
            name: (kind, default, told) for name, kind, default, told in rows
        }
    return found


@pytest.mark.parametrize("name", PAGES)
def test_the_committed_page_is_what_the_schema_makes(name):
    made = PAGES[name]()
    assert (CHECKOUT / name).read_text() == made, "python -m pipeline.schema_docs --write"


def test_every_record_and_field_is_there():
    found = tables(records_page())
    for name, record in RECORD_TYPES.items():
        assert list(found[name]) == [field for field in record.model_fields if field != "id"]
    for name in re.findall(r"\]\(#(\w+)\)", records_page()):
        assert name in {heading.lower() for heading in found}


def every_key(section, path=""):
    """Each key with a value of its own, read off a whole config: not by the page's own walk."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from every_key(value, f"{path}{name}.")
        else:
            yield path, name, value


def test_every_key_of_a_config_is_there_with_its_default():
    found = tables(config_page())
    for path, name, value in every_key(Config(name="x")):
        heading = path.rstrip(".") or "Top level"
        is_common = heading.endswith("runtime") and name in Runtime.model_fields
        _, default, _ = found["runtime` of every stage" if is_common else heading][name]
        if name == "name":
            assert default == "required"
        elif value is None:
            assert default == "`null`"
        elif isinstance(value, bool):
            assert default == f"`{str(value).lower()}`"
        elif isinstance(value, int | float):
            assert float(default.strip("`")) == value
        elif isinstance(value, str) and value:
            assert default == f"`{value}`"
        else:
            assert default.startswith(("`[", "`{", '`""'))


def test_sections_within_lists_and_options_have_tables():
    found = tables(config_page())
    assert {"voices.dataset", "speech.models.<key>", "train.lora", "serve.sampling"} <= set(found)
    assert list(found["speech.models.<key>"]) == ["weights", "revision", "voices"]


@pytest.mark.parametrize(
    ("model", "field", "expected"),
    [
        (Persona, "facts", "list of [Fact](#fact), at least 1"),
        (Persona, "interrupts", "number, at least 0, at most 1"),
        (Turn, "cut_after_words", "integer or null, at least 1"),
        (Dialogue, "first_speaker", "`agent` or `user`"),
        (Voice, "params", "text → text or integer or number"),
        (TimelineSection, "yield_ms", "[integer, integer]"),
        (TensorsSection, "alignment", "`onset` or `word` or `uniform`"),
        (VoicesSection, "names", "text → list of text or null"),
        (SpeechSection, "timeline", "section"),
    ],
)
def test_types_in_words(model, field, expected):
    assert type_of(model, field) == expected


def test_a_page_that_differs_is_named_and_written_anew(tmp_path, capsys):
    for name in PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((CHECKOUT / name).read_text())
    assert main([], tmp_path) == 0
    (tmp_path / "docs" / "config.md").write_text("old")
    assert main([], tmp_path) == 1
    said = capsys.readouterr().out
    assert "docs/config.md must be what the schema says" in said and "records" not in said
    assert main(["--write"], tmp_path) == 0 and main([], tmp_path) == 0
    assert main(["--wrong"], tmp_path) == 2
