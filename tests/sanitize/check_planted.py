"""Check that a sanitizer reports each planted bug, and none in sound code.

python tests/sanitize/check_planted.py build/tsan/sanitize_planted thread
python tests/sanitize/check_planted.py build/sanitize/sanitize_planted address
"""

import platform
import subprocess
import sys

REPORTS = {
    "thread": {
        "race": "WARNING: ThreadSanitizer: data race",
        "missing barrier": "WARNING: ThreadSanitizer: data race",
    },
    "address": {
        "overrun": "ERROR: AddressSanitizer: heap-buffer-overflow",
        "overflow": "runtime error: signed integer overflow",
    },
}


def main(program: str, sanitizer: str) -> int:
    # The thread sanitizer supports no more address randomisation than older kernels had.
    plain = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" else []
    failed = 0
    for name, report in {"sound": "", **REPORTS[sanitizer]}.items():
        result = subprocess.run([*plain, program, name], capture_output=True, text=True)
        sound = result.returncode == 0 and not result.stderr
        found = report in result.stderr and result.returncode != 0
        if not (found if report else sound):
            print(f"{name}: expected {report or 'no report'}, got {result.stderr or 'none'}")
            failed = 1
    print(f"{sanitizer} sanitizer: " + ("FAILED" if failed else "finds the planted bugs"))
    return failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
