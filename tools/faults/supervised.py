"""Supervises a program that is not `maxlm train`: python tools/faults/supervised.py LIMITS PROGRAM.py [argument ...].

LIMITS is a JSON object of supervise.Limits, and grace_s: from SIGTERM to SIGKILL, in seconds.
"""

import json
import sys

from maxlm import supervise

if __name__ == "__main__":
    limits = json.loads(sys.argv[1])
    supervise.GRACE_S = limits.pop("grace_s", supervise.GRACE_S)
    sys.exit(supervise.supervise([sys.executable, *sys.argv[2:]], supervise.Limits(**limits)))
