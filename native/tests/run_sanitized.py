"""Runs pytest on the package in a folder instead of the installed one: `make sanitize` builds that with the sanitizers.

python native/tests/run_sanitized.py FOLDER [pytest arguments]
"""

import sys

import pytest

# An editable install answers for `shoal` before sys.path is asked.
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
sys.path.insert(0, sys.argv[1])

import shoal.kernels  # noqa: E402  (after the path is set)

assert shoal.kernels.__file__.startswith(sys.argv[1]), shoal.kernels.__file__
assert shoal.kernels.available_isas()[-1] == "scalar", "built without the extension"
sys.exit(pytest.main(sys.argv[2:]))
