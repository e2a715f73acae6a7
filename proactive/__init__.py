"""What a person runs: one module for each command."""

import sys

from datamodules.errors import UserError
from proactive.environment import refuse_impossible_place

try:
    refuse_impossible_place()  # before Lightning is imported, which would end in a traceback
except UserError as mistake:
    print(f"error: {mistake.what}\n  help: {mistake.hint}", file=sys.stderr)
    sys.exit(2)
