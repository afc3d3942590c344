"""Which browser the tests of the pages are driven in, if there is one."""

import shutil
from importlib.util import find_spec

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HAS_BROWSER = CHROMIUM is not None and find_spec("playwright") is not None
