"""`python -m proactive`: the command `proactive`."""

import runpy

# By that name, processes that this one starts load the package before they load what they are given.
runpy.run_module("proactive.commands", run_name="__main__", alter_sys=True)
