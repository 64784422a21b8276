"""Fuzz one target with atheris, starting from its corpus.

    python tests/fuzz/fuzz.py config_json 60        # seconds; 0 for no end
    python tests/fuzz/fuzz.py config_json,audio 60  # one after another, in a process each
    python tests/fuzz/fuzz.py config_json crash-0123...   # runs one finding

An input that is a finding is written to `build/fuzz/<target>/`; once it is mended, move it to
`tests/fuzz/corpus/<target>/`, which `make test` runs. New inputs that reach more code are kept in
`build/fuzz/<target>/corpus`.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(Path(__file__).parent)]
os.environ.setdefault("RUST_BACKTRACE", "0")

import atheris

with atheris.instrument_imports(include=["vox_serve", "json"]):
    import targets

    # Imported by the targets when they run.
    import vox_serve.api
    import vox_serve.weights  # noqa: F401


def main(name: str, what: str) -> None:
    corpus = Path(__file__).parent / "corpus" / name
    found = ROOT / "build" / "fuzz" / name
    (found / "corpus").mkdir(parents=True, exist_ok=True)
    arguments = [
        f"-timeout={targets.TIMEOUT_S}",
        "-rss_limit_mb=6000",
        "-max_len=65536",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    if what.isdigit():
        arguments += [f"-max_total_time={what}", str(found / "corpus"), str(corpus)]
    else:
        arguments.append(what)
    targets.set_up()
    atheris.Setup([sys.argv[0], *arguments], lambda data: targets.run(name, data))
    atheris.Fuzz()


def each(names: list[str], what: str) -> int:
    """Run the targets in forks of this process, which has imported all; 1 if one has a finding."""
    failed = False
    for name in names:
        child = os.fork()
        if child == 0:
            main(name, what)
        _, status = os.waitpid(child, 0)
        if status:
            print(f"fuzz: {name} ended with status {status}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    if len(names := sys.argv[1].split(",")) > 1:
        sys.exit(each(names, sys.argv[2]))
    main(*sys.argv[1:])
