"""Names what this machine lacks for `make setup`; exit code 2 if anything does. Runs on any Python 3."""

import importlib.util
import os
import shutil
import sys
import sysconfig


def missing():
    if sys.version_info < (3, 11):
        yield "Python 3.11 or newer: this is {}.{}; call make PYTHON=python3.11".format(*sys.version_info[:2])
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            yield "Python's %s module: on Debian and Ubuntu, install python3-venv" % module
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++"]
    if not any(shutil.which(compiler) for compiler in compilers):
        yield "a C++ compiler (%s), which DeepSpeed and torch.compile build with: install g++" % " or ".join(compilers)
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        yield "Python's headers (%s), which DeepSpeed builds with: install python3-dev" % header


if __name__ == "__main__":
    lacking = list(missing())
    for item in lacking:
        print("make setup: missing " + item, file=sys.stderr)
    sys.exit(2 if lacking else 0)
