"""The report's section on the package behind a real Triton server: load, parity, versions, faults, drift."""

from clip_deploy.core.records import Parity
from clip_deploy.core.served import Agreement, Drift, Fault, Load, Served, VersionStep
from clip_deploy.report.contents import Report, Section, Table
from clip_deploy.report.tables import MISSING, number

TITLE = "Served by Triton"
TIMED = (
    "perf_analyzer on the same machine and cores as the server: requests/s are means over three windows (lowest and "
    "highest window in brackets); latencies are the clients', the queue's is the server's own clock. A percentile is "
    "stated where at least 5 calls lie beyond it. Mean batch: what the dynamic batcher put together."
)
ENSEMBLE = "clip_zero_shot"  # its own queue and batches say nothing: those of its parts do


def triton_section(report: Report) -> Section | None:
    """What serving.validation.check_served found."""
    return _section(report.served) if report.served else None


def _section(served: Served) -> Section:
    found, reasons = served.answers, "; ".join(served.reasons)
    if found is None:
        return Section(TITLE, [f"`{served.status}`: {reasons}"])
    server = ", ".join(f"{name} {version}" for name, version in found.server.items())
    outcome = (
        f"**{served.status}**: {reasons or 'all of the below'} ({server}; the repository for "
        f"the {found.backend} backend; {found.threads} threads for each tower)."
    )
    return Section(
        TITLE,
        [
            outcome,
            TIMED,
            _load(found.load),
            "Held against the package's own graphs, run without a server on the same batches; only with several "
            "clients does the server choose the batches, and dynamic INT8 takes its scales from a whole batch, padding "
            "included.",
            _parity(found.parity),
            "Versions, changed while a client went on asking; version 2 has other weights, which negate image "
            "embeddings:",
            _versions(found.asked.versions),
            "Faults. Refused: a client's mistake, with HTTP's 400 or gRPC's INVALID_ARGUMENT; a dash where that is not "
            "asked, as of what Triton's own parser answers. Survived: afterwards the server is ready, and answers an "
            "image and a question to all models as before.",
            _faults(found.asked.faults),
            "Drift of image embeddings against the first half of the golden set, by their maximum mean discrepancy; "
            "the threshold is that of 1 % of shuffles:",
            _drift(found.drift),
        ],
    )


def _load(rows: list[Load]) -> Table:
    head = ["Model", "Request", "Protocol", "Clients", "Requests/s", "p50 / p90 / p99 ms", "Queue ms", "Mean batch"]
    return Table(head, [_load_cells(row) for row in rows])


def _load_cells(row: Load) -> list[str]:
    windows, inner = row.windows_per_s, row.model != ENSEMBLE
    spread = f" [{number(min(windows))}, {number(max(windows))}]" if windows else ""
    return [
        f"`{row.model}`",
        row.note,
        row.protocol,
        str(row.clients),
        number(row.requests_per_s) + spread,
        " / ".join(map(number, (row.p50_ms, row.p90_ms, row.p99_ms))),
        number(row.queue_ms) if inner else MISSING,
        number(row.mean_batch) if inner else MISSING,
    ]


def _parity(parities: dict[str, Parity | Agreement]) -> Table:
    head = ["What", "Lowest cosine", "Largest difference", "Same answer %"]
    body = []
    for name, parity in parities.items():
        cosine = f"{parity.cosine_min:.6f}" if isinstance(parity, Parity) else MISSING
        same = parity.same_answer_percent if isinstance(parity, Agreement) else None
        body.append([name, cosine, f"{parity.max_abs_diff:.2g}", number(same)])
    return Table(head, body)


def _versions(steps: list[VersionStep]) -> Table:
    head = ["Step", "Versions that answer", "Without a version", "Each by its own weights", "Requests", "Failed"]
    return Table(
        head,
        [
            [
                step.step,
                ", ".join(step.ready),
                f"version {step.answers}",
                "yes" if step.right else "**no**",
                str(step.sent),
                str(step.failed),
            ]
            for step in steps
        ],
    )


def _faults(faults: list[Fault]) -> Table:
    return Table(
        ["Fault", "Answer", "Refused", "Survived"],
        [
            [
                fault.fault,
                fault.answer,
                {True: "yes", False: "**no**", None: MISSING}[fault.refused],
                "yes" if fault.survived else "**no**",
            ]
            for fault in faults
        ],
    )


def _drift(found: dict[str, Drift]) -> Table:
    head = ["Live images", "Found", "Discrepancy", "Threshold", "p", "Cosine of the means"]
    body = [
        [
            name,
            "drift" if drift.drifted else "no drift",
            f"{drift.mmd2:.2g}",
            f"{drift.threshold:.2g}",
            f"{drift.p_value:.3f}",
            f"{drift.mean_cosine:.3f}",
        ]
        for name, drift in found.items()
    ]
    return Table(head, body)
