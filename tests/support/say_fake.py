"""`say` with the fake engine, as a program of its own: python tests/support/say_fake.py [flags]"""

import sys

from fake_engine import FakeEngine
from vox_serve import say

if __name__ == "__main__":
    say.make_engine = lambda *_, **__: FakeEngine()
    sys.exit(say.main())
