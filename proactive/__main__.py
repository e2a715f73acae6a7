"""`python -m proactive`: the command `proactive`."""

import runpy

# With this name, child processes import the package before they unpickle their arguments.
runpy.run_module("proactive.commands", run_name="__main__", alter_sys=True)
