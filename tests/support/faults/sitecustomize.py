"""Python imports this first of all where tests/test_faults.py has put the folder on PYTHONPATH."""

import os
import sys

from moments import FAULT, MODULE, fault, install

if FAULT in os.environ and sys.orig_argv[1:3] == ["-m", os.environ[MODULE]]:
    install(fault(*os.environ[FAULT].split()))
