"""Documents read in the child process: text, spans, refusals, limits."""

from __future__ import annotations

import random
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knowledge.conftest import DOCUMENTS
from knowledge.pdf import make_pdf
from millpond.errors import InvalidInput, Permanent, Transient
from millpond.knowledge import reader
from millpond.knowledge.chunker import CHUNK_CHARS, spans


async def test_markdown_stays_as_written_and_its_first_heading_is_the_title() -> None:
    text = "intro\r\n\r\n# The title #\n\nA *body* with `code`.\n"
    parsed = await reader.parse("text/markdown", text.encode())
    assert parsed.text == text.replace("\r\n", "\n")
    assert parsed.title == "The title"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
async def test_text_is_read_in_the_usual_encodings(encoding: str) -> None:
    parsed = await reader.parse("text/plain", "Größe: 5 €".encode(encoding))
    assert parsed.text == "Größe: 5 €"


async def test_control_characters_are_dropped() -> None:
    parsed = await reader.parse("text/plain", b"a\x01b\x0bc\td")
    assert parsed.text == "abc\td"


HTML = """<html><head><title>Shop &amp; care</title><style>p {}</style></head><body>
<nav>Home</nav><script>steal()</script>
<h2>Care</h2>Intro <b>bold</b> text<p>Para  one</p>tail
<ul><li>first</li><li>second <i>part</i></li></ul>
<table><tr><th>Item</th><th>Days</th></tr><tr><td>Rope</td><td>30</td></tr></table>
</body></html>"""


async def test_html_gives_its_visible_text_with_headings_lists_and_rows() -> None:
    parsed = await reader.parse("text/html", HTML.encode())
    assert parsed.title == "Shop & care"
    assert parsed.text == (
        "## Care\n\nIntro bold text\n\nPara one\n\ntail\n\n"
        "- first\n- second part\n\nItem | Days\nRope | 30\n"
    )


async def test_pdf_gives_text_pages_and_title() -> None:
    parsed = await reader.parse("application/pdf", make_pdf(["First page.", "Second page."]))
    assert parsed.text.startswith("First page.")
    assert parsed.text[parsed.page_starts[1] :].startswith("Second page.")
    manual = await reader.parse("application/pdf", (DOCUMENTS / "ember-2-manual.pdf").read_bytes())
    assert manual.title == "Ember 2 Camp Stove Manual"
    assert len(manual.page_starts) == 4
    assert "Use only threaded isobutane-propane canisters of the EN 417 type" in manual.text


@pytest.mark.parametrize(
    ("media", "content", "code"),
    [
        ("application/pdf", b"%PDF-1.7 and then nothing of the kind", "damaged"),
        ("application/pdf", make_pdf([""]), "no_text"),
        ("application/pdf", make_pdf(["secret"], is_encrypted=True), "encrypted"),
        ("text/html", b"<html><script>only()</script></html>", "no_text"),
        ("text/markdown", b"\x01\x02", "no_text"),
        ("text/plain", b"\xff\xfe\x00\xd8\x41", "unknown_encoding"),
        ("text/plain", b"a" * 5_000_001, "too_large"),
    ],
)
async def test_what_holds_no_readable_text_is_refused(
    media: str, content: bytes, code: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        await reader.parse(media, content)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "limits",
    [
        reader.Limits(memory_bytes=64 * 1024 * 1024),
        reader.Limits(wall_s=0.001),
    ],
    ids=["memory", "time"],
)
async def test_a_reader_past_its_limits_is_a_classified_error(limits: reader.Limits) -> None:
    with pytest.raises(Permanent):
        await reader.parse("text/html", b"<p>word</p>" * 1_500_000, limits)


async def test_the_reader_sees_no_secret_of_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLPOND_SECRET_KEY", "s")
    monkeypatch.setattr(reader, "_MODULE", "knowledge.show_environment")
    parsed = await reader.parse("text/plain", b"x")
    assert "MILLPOND" not in parsed.text
    assert "PYTHONPATH" in parsed.text


async def test_markdown_chunks_are_exact_spans_that_begin_with_their_heading() -> None:
    text = (DOCUMENTS / "returns-policy.md").read_text(encoding="utf-8")
    found = await reader.split("text/markdown", text)
    assert len(found) > 8
    assert any(text[start:end].startswith("## 5. Refunds and exchanges") for start, end in found)
    for start, end in found:
        assert 0 < end - start <= CHUNK_CHARS[1]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "word ",
                "Größe ",
                "日本語 ",
                "🚣 ",
                "\n",
                "\n\n",
                "# head\n",
                "- item\n",
                "| a | b |\n",
                "x" * 900,
            ]
        ),
        max_size=120,
    ).map("".join),
    st.sampled_from(["text/plain", "text/markdown"]),
)
def test_spans_ascend_do_not_overlap_and_leave_out_only_blanks(text: str, media: str) -> None:
    last = 0
    for start, end in spans(media, text):
        assert last <= start < end <= len(text)
        assert not text[last:start].strip()
        assert text[start:end].strip()
        last = end
    assert not text[last:].strip()


@pytest.mark.parametrize(
    ("title_hex", "title"),
    [("FEFF004100000042", "AB"), ("FEFFD800", None), ("FEFF" + "0041" * 900, "A" * 300)],
)
async def test_a_pdfs_own_title_cannot_break_its_ingestion(
    title_hex: str, title: str | None
) -> None:
    parsed = await reader.parse("application/pdf", make_pdf(["Some text."], title_hex=title_hex))
    assert parsed.title == title
    assert parsed.text.startswith("Some text.")


async def test_a_reader_that_was_stopped_may_be_tried_again() -> None:
    with pytest.raises(Transient):
        reader._understood(-signal.SIGTERM, b"")


def test_headings_alone_do_not_make_one_endless_chunk() -> None:
    text = "\n".join(f"# item {n} settings" for n in range(5_000))
    found = spans("text/markdown", text)
    assert max(end - start for start, end in found) <= 2 * sum(CHUNK_CHARS)
    assert sum(end - start for start, end in found) > len(text) * 0.98


def test_large_text_is_split_whole() -> None:
    rng = random.Random(7)
    text = " ".join(rng.choice(["stove", "tent.", "rope,", "kayak"]) for _ in range(50_000))
    found = spans("text/plain", text)
    assert sum(end - start for start, end in found) > len(text) * 0.98
