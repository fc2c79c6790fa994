"""Shapes of the audit log, as the JSON and CSV that clients see.

Called by its routes. Invariant: as in `shapes`; a cell of CSV is never a formula.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from millpond.api.reply import raw
from millpond.identity.audit_chain import Head
from millpond.identity.audit_check import Report
from millpond.identity.audit_log import Told

COLUMNS = (
    "org",
    "seq",
    "audit_id",
    "at",
    "subject",
    "granted_by",
    "action",
    "resource",
    "run_id",
    "address",
    "details",
    "key_id",
    "sealed_at",
    "mac",
)
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def entry_json(told: Told) -> dict[str, Any]:
    """Return a row of the log."""
    entry = told.entry
    return {
        "id": entry.audit_id,
        "object": "audit_entry",
        "at": entry.at,
        "subject": entry.subject,
        "granted_by": entry.granted_by,
        "action": entry.action,
        "resource": entry.resource,
        "run_id": entry.run_id,
        "address": entry.address,
        "details": raw(entry.details),
        "seal": None if told.seal is None else head_json(told.seal),
    }


def head_json(head: Head) -> dict[str, Any]:
    """Return a place in a chain."""
    return {
        "seq": head.seq,
        "mac": head.mac,
        "key_id": head.key_id,
        "sealed_at": head.sealed_at,
    }


def report_json(report: Report) -> dict[str, Any]:
    """Return what verifying found."""
    fault = report.first_fault
    return {
        "object": "audit_verification",
        "is_intact": report.is_intact,
        "sealed": report.sealed,
        "last_seq": report.last_seq,
        "has_more": report.has_more,
        "unsealed": report.unsealed,
        "oldest_unsealed_s": report.oldest_unsealed_s,
        "head": None if report.head is None else head_json(report.head),
        "published_seq": report.published_seq,
        "fault_count": report.fault_count,
        "first_fault": None
        if fault is None
        else {
            "kind": fault.kind,
            "text": fault.text,
            "seq": fault.seq,
            "audit_id": fault.audit_id,
        },
    }


def csv_line(values: Mapping[str, Any] | None) -> bytes:
    """Return a line of CSV (RFC 4180), or the line of names; formulas of spreadsheets get a quote before."""
    text = io.StringIO()
    cells = COLUMNS if values is None else [_cell(values[name]) for name in COLUMNS]
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(_FORMULAS) else text
