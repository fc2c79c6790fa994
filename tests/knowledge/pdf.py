"""Writes small PDFs by hand (PDF 1.4), so that tests need no PDF library."""

from __future__ import annotations


def make_pdf(pages: list[str], *, is_encrypted: bool = False, title_hex: str = "") -> bytes:
    """Return a PDF with one line of text a page; encrypted ones ask for a password nobody knows."""
    kids = " ".join(f"{4 + 2 * n} 0 R" for n in range(len(pages)))
    bodies = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for n, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET"
        bodies.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * n} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        bodies.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    trailer = f"/Size {len(bodies) + 1} /Root 1 0 R"
    if is_encrypted:
        key = "<" + "ab" * 32 + ">"
        bodies.append(f"<< /Filter /Standard /V 1 /R 2 /Length 40 /P -4 /O {key} /U {key} >>")
        trailer += f" /Encrypt {len(bodies)} 0 R /ID [<00> <00>]"
    if title_hex:
        bodies.append(f"<< /Title <{title_hex}> >>")
        trailer += f" /Info {len(bodies)} 0 R"
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(bodies, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{offset:010d} 00000 n \n" for offset in offsets)
    start = len(out)
    out += f"xref\n0 {len(bodies) + 1}\n0000000000 65535 f \n{table}".encode()
    return out + f"trailer\n<< {trailer} >>\nstartxref\n{start}\n%%EOF\n".encode()
