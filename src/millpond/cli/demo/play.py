"""The demo, act by act: ingest, ask, kill a worker, wait for humans, decide, prove.

Called by `command` with a running platform. Invariants: everything goes through the HTTP API, as a
stranger's program would; the only other thing it does is to kill the worker, once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from millpond.cli.demo import proof
from millpond.cli.demo.proof import Finding
from millpond.cli.demo.script import BASE, FLOW, QUESTIONS, Question, documents, read_text
from millpond.cli.demo.stage import Stage
from millpond.cli.demo.watch import Watch
from millpond.cli.platform import Platform
from millpond.cli.remote import FINAL_KINDS, Remote
from millpond.errors import Permanent
from millpond.types import Json

# Ample: a slow machine is no failure, an event that never comes is.
_PATIENCE_S = 240.0
DRAFT = "models.complete"
_WAITS = ("run.awaiting_input", *sorted(FINAL_KINDS))


@dataclass(kw_only=True)
class Play:
    """One performance: what it works with, and what it has seen so far."""

    remote: Remote
    platform: Platform
    stage: Stage
    clone: Path
    lease_s: float
    runs: dict[str, Question] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    killed: str = ""
    killed_pid: int = 0
    before_kill: Json = None

    async def perform(self) -> list[Json]:
        """Play every act; returns the runs that answer the questions, as they ended."""
        async with Watch(self.remote, self.stage.event) as watch:
            await self._ingest(watch)
            await self._ask(watch)
            await self._kill(watch)
            await self._show_waiting(watch)
            await self._decide(watch)
            runs = [await self._run(run_id) for run_id in self.runs]
            self._show_ends(runs)
            self._prove(runs, watch)
        return runs

    async def _ingest(self, watch: Watch) -> None:
        """Send the shipped documents and wait until they can be searched."""
        self.stage.act("Two documents go into a knowledge base")
        accepted: dict[str, str] = {}
        for path in documents(self.clone):
            response = await self.remote.post_raw(
                f"/v1/knowledge-bases/{BASE}/documents",
                content=path.read_bytes(),
                params={"filename": path.name},
                headers={"Content-Type": "application/octet-stream"},
            )
            run = response.json()
            self.stage.say(f"   POST {path.name}: {response.status_code}, run {run['id']}")
            accepted[run["id"]] = path.name
            watch.add(run["id"], f"D{len(accepted)}")
        await watch.until(
            "the ingestion of the documents",
            lambda: all(watch.stands_at(run_id, *FINAL_KINDS) for run_id in accepted),
            timeout_s=_PATIENCE_S,
        )
        is_done = all(watch.stands_at(run_id, "run.succeeded") for run_id in accepted)
        self._find(
            f"{len(accepted)} documents were ingested", is_true=is_done and len(accepted) > 1
        )

    async def _ask(self, watch: Watch) -> None:
        """Post each question: accepted at once, worked on later."""
        self.stage.act("Questions are accepted at once and worked on by the worker")
        statuses = []
        for question in QUESTIONS:
            began = time.monotonic()
            body = {"flow": FLOW, "input": {"text": question.text, "base": BASE}}
            headers = {"Idempotency-Key": f"demo-{question.label}"}
            response = await self.remote.post_raw("/v1/runs", body, headers=headers)
            took_ms = (time.monotonic() - began) * 1000
            run = response.json()
            statuses.append(response.status_code)
            self.stage.say(f"   {question.label}: {question.text}")
            self.stage.say(
                f"       {response.status_code} after {took_ms:.0f} ms, "
                f"Location {response.headers.get('Location', '–')}"
            )
            self.runs[run["id"]] = question
            watch.add(run["id"], question.label)
        self._find("every question was answered with 202 and a run", is_true={*statuses} == {202})

    async def _kill(self, watch: Watch) -> None:
        """Kill the worker while the model drafts, with steps recorded; wait for the rescue."""
        await watch.until(
            "the drafting of a reply",
            lambda: self._drafting(watch) is not None or self._all_wait(watch),
            timeout_s=_PATIENCE_S,
        )
        run_id = self._drafting(watch) or next(iter(self.runs))
        label = self.runs[run_id].label
        pid = self.platform.worker.pid
        if pid is None:
            raise Permanent("the worker is not there to be killed")
        os.kill(pid, signal.SIGKILL)
        self.killed, self.killed_pid = run_id, pid
        self.before_kill = await self._run(run_id)
        self._find(
            "the API went on answering without the worker",
            is_true=self.before_kill["id"] == run_id and not watch.has(run_id, "run.rescued"),
        )
        done = [step["name"] for step in proof.recorded(self.before_kill).values()]
        self.stage.act(f"kill -9 of the worker (process {pid}) while the model drafts {label}")
        self.stage.say(f"   recorded of {label} so far: {', '.join(done) or 'nothing'}")
        self.stage.say(
            f"   The API is alive. The lease runs out within {self.lease_s:.0f} s; then a new "
            "worker takes the runs over."
        )
        is_half_done = bool(done) and DRAFT not in done
        self._find("the worker was killed in the middle of a run", is_true=is_half_done)
        await watch.until(
            f"the rescue of {label}",
            lambda: watch.has(run_id, "run.rescued") or watch.stands_at(run_id, *FINAL_KINDS),
            timeout_s=_PATIENCE_S,
        )
        await watch.until(
            "every run's way to a human",
            lambda: self._all_wait(watch),
            timeout_s=_PATIENCE_S,
        )

    def _drafting(self, watch: Watch) -> str | None:
        """Return a run whose topic is recorded and whose draft is being written, if there is one."""
        for run_id in self.runs:
            began = watch.has(run_id, "step.started", DRAFT)
            is_classified = watch.has(run_id, "step.succeeded", "support.classify")
            if began and is_classified and not watch.has(run_id, "step.succeeded", DRAFT):
                return run_id
        return None

    def _all_wait(self, watch: Watch) -> bool:
        return all(watch.stands_at(run_id, *_WAITS) for run_id in self.runs)

    async def _show_waiting(self, watch: Watch) -> None:
        """Show that runs which await a human hold no slot."""
        self.stage.act("All runs await a human, and hold nothing")
        queues = (await self.remote.get("/v1/queues"))["data"]
        self.stage.queues([queue for queue in queues if queue["name"] in ("support", "index")])
        awaiting = sum(queue["awaiting_input"] for queue in queues)
        running = sum(queue["running"] for queue in queues)
        self._find(
            "waiting runs hold no slot",
            is_true=running == 0 and awaiting == len(self.runs),
            detail=f"{awaiting} await input, {running} run",
        )

    async def _decide(self, watch: Watch) -> None:
        """Answer every request as the script says."""
        self.stage.act("A human decides, by API")
        requests = (await self.remote.get("/v1/input-requests", {"state": "pending"}))["data"]
        by_run = {request["run_id"]: request for request in requests}
        for run_id, question in self.runs.items():
            request = by_run.get(run_id)
            if request is None:
                continue
            answer = _answer(question)
            self.stage.say(f"   {question.label}: {request['title']}: {question.decision}")
            body = {"answer": answer, "digest": request["digest"]}
            await self.remote.post(f"/v1/input-requests/{request['id']}/resolve", body)
        self._find("every run asked a human", is_true=set(by_run) >= set(self.runs))
        await watch.until(
            "the end of every run",
            lambda: all(watch.stands_at(run_id, *FINAL_KINDS) for run_id in self.runs),
            timeout_s=_PATIENCE_S,
        )

    def _show_ends(self, runs: list[Json]) -> None:
        self.stage.act("What is recorded")
        for run in runs:
            question = self.runs[run["id"]]
            self.stage.timeline(question.label, run)
            if run["output"]:
                self.stage.reply(question.text, run["output"])

    def _prove(self, runs: list[Json], watch: Watch) -> None:
        """Check every claim on what the API told."""
        self.stage.act("Is it all true?")
        by_id = {run["id"]: run for run in runs}
        self._prove_rescue(by_id[self.killed], watch)
        twice = [key for run_id in self.runs for key in proof.ran_twice(watch.events[run_id])]
        self._find("no recorded step ran twice", is_true=not twice, detail=", ".join(twice))
        self._find(
            "the events of every run are numbered without a gap",
            is_true=all(proof.numbers_have_no_gap(events) for events in watch.events.values()),
        )
        texts = {path.name: read_text(path) for path in documents(self.clone)}
        for run in runs:
            self._prove_reply(self.runs[run["id"]], run, texts)
        self.stage.findings(self.findings)

    def _prove_rescue(self, run: Json, watch: Watch) -> None:
        events = watch.events[self.killed]
        self._find(
            "another worker took the run over",
            is_true=watch.has(self.killed, "run.rescued")
            and run["attempts"] > 1
            and self.platform.worker.pid not in (None, self.killed_pid),
            detail=f"process {self.platform.worker.pid}, {run['attempts']} attempts in all",
        )
        changed = proof.changed_since(self.before_kill, run)
        touched = proof.touched_after_rescue(self.before_kill, events)
        kept = len(proof.recorded(self.before_kill))
        self._find(
            "what was recorded before the kill was kept and not run again",
            is_true=kept > 0 and not changed and not touched,
            detail=", ".join(changed + touched) or f"{kept} steps",
        )

    def _prove_reply(self, question: Question, run: Json, texts: Mapping[str, str]) -> None:
        """Check one run's end against what the script decided."""
        output = run["output"] or {}
        citations = output.get("citations", [])
        names = {step["name"] for step in run["steps"]}
        label = question.label
        expected = {"approve": output.get("draft"), "edit": question.written}
        reply = expected.get(question.decision, question.written)
        self._find(
            f"{label} succeeded with the reply that a human decided",
            is_true=run["state"] == "succeeded" and bool(reply) and output.get("reply") == reply,
        )
        if question.is_answerable:
            wrong = proof.uncited(citations, texts)
            claim = f"{label} cites words that stand in the shipped documents"
            is_true = bool(citations) and not wrong
            self._find(claim, is_true=is_true, detail="; ".join(wrong) or f"{len(citations)}")
            return
        self._find(
            f"{label}, which the documents do not answer, went to a human without a draft",
            is_true=DRAFT not in names and not citations and "write" in names,
        )

    def _find(self, claim: str, *, is_true: bool, detail: str = "") -> None:
        self.findings.append(Finding(claim=claim, is_true=is_true, detail=detail))

    async def _run(self, run_id: str) -> Json:
        return await self.remote.get(f"/v1/runs/{run_id}")


def _answer(question: Question) -> Json:
    """Return the answer that the script gives, in the form of the question asked."""
    match question.decision:
        case "approve":
            return {"decision": "approve"}
        case "edit":
            return {"decision": "edit", "text": question.written}
        case "write":
            return {"text": question.written}
