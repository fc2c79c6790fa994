"""Sets a manual's text as a PDF: `python make_pdf.py ember-2-manual.source ../ember-2-manual.pdf`.

Needs `reportlab` (BSD), which Millpond itself does not use. The PDF is in the repository, so that this
is only run when the text changes. The ending keeps the text from being ingested beside the PDF.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reportlab.lib.pagesizes import A5
from reportlab.lib.styles import getSampleStyleSheet
from reportlab.lib.units import mm
from reportlab.platypus import Paragraph, SimpleDocTemplate, Spacer


def main(source: Path, target: Path) -> None:
    """Turn `#` lines into headings and blank-line-parted text into paragraphs."""
    styles = getSampleStyleSheet()
    body = styles["BodyText"]
    body.fontSize, body.leading = 9, 12
    blocks = source.read_text(encoding="utf-8").strip().split("\n\n")
    title = blocks[0].lstrip("# ")
    story: list[object] = []
    for block in blocks:
        for line in block.split("\n") if block[0].isdigit() else [block]:
            text = line.replace("&", "&amp;").replace("<", "&lt;")
            if text.startswith("## "):
                story.append(Paragraph(text[3:], styles["Heading2"]))
            elif text.startswith("# "):
                story.append(Paragraph(text[2:], styles["Title"]))
            else:
                story.append(Paragraph(text.replace("\n", " "), body))
            story.append(Spacer(1, 1.5 * mm))
    document = SimpleDocTemplate(
        str(target),
        pagesize=A5,
        title=title,
        author="Lakehouse Outfitters",
        margin=15 * mm,
        leftMargin=15 * mm,
        rightMargin=15 * mm,
        invariant=1,
    )
    document.build(story)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
