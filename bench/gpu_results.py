"""Results of a GPU check: the card, failed tests, key figures, and an archive of all logs."""

import io
import re
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def card(program: str = "nvidia-smi") -> str:
    """The GPU's name in the form of a folder name: "h100-80gb-hbm3"."""
    command = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    name = (found.splitlines() or ["unknown"])[0].removeprefix("NVIDIA ")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def pack_logs(folder: Path, archive: Path, max_bytes: int = 4 << 20) -> None:
    """Packs all logs and reports of a folder into one file, each cut to its last `max_bytes`."""
    with tarfile.open(archive, "w:gz", compresslevel=6) as packed:
        for path in sorted((*folder.glob("*.log"), *folder.glob("*.xml"))):
            data = path.read_bytes()[-max_bytes:]
            entry = tarfile.TarInfo(path.name)
            entry.size, entry.mtime = len(data), int(path.stat().st_mtime)
            packed.addfile(entry, io.BytesIO(data))


def count_tests(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts of passed, failed and skipped tests in pytest's XML report, and for each failure the
    test's name with the start of its message."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    if not report.exists():
        return counts, failures
    for case in ElementTree.parse(report).iter("testcase"):
        broken = [case.find(tag) for tag in ("failure", "error")]
        message = next((b.get("message", "") for b in broken if b is not None), None)
        if message is not None:
            counts["failed"] += 1
            failures.append(f"{case.get('classname')}::{case.get('name')}: {message[:300]}")
        else:
            counts["skipped" if case.find("skipped") is not None else "passed"] += 1
    return counts, failures


def headlines(tables: dict) -> list[str]:
    """The key figures of the benchmark tables, one line each."""
    lines = []
    frames = tables.get("frame", [])
    for row in frames:
        if row["batch"] == 1:
            line = (
                f"frame, batch 1, {row['precision']}: {row['ms']:.3g} ms, "
                f"{row['% roofline']:.0f} % of the floor"
            )
            if persistent := row.get("persistent ms"):
                line += f", persistent {persistent:.3g} ms (x {row['x persistent']:.3g})"
            lines.append(line)
    for row in tables.get("triton_frame", []):
        if row["batch"] == 1:
            native = row.get("native ms")
            beside = f", with the CUDA kernels {native:.3g}" if native else ""
            lines.append(f"frame, batch 1, {row['precision']}, Triton: {row['ms']:.3g} ms{beside}")
    for what, rows in (("without the codec", frames), ("in the engine", tables.get("speech", []))):
        if in_time := [row for row in rows if row["ms"] <= 80]:
            best = max(in_time, key=lambda row: row["streams"])
            lines.append(
                f"real-time streams {what}: {best['streams']:.0f} (batch {best['batch']}, "
                f"{best['precision']}, {best['ms']:.3g} ms)"
            )
    for row in tables.get("kernels", []):
        shape = f"{row['op']} {row['shape']}"
        if re.search(r"linear .*(gate_up|down) \[1,|decode_attention .* 2048 keys", shape):
            lines.append(
                f"{shape}: {1e3 * row['ms']:.3g} us, {row['% roofline']:.0f} % of the floor"
            )
        elif shape.startswith("sample_tokens [256,"):
            lines.append(f"{shape}: {1e3 * row['ms']:.3g} us")
    return lines
