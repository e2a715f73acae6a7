"""Bad inputs by group: each module has CASES, which tests/proactive/test_bad_inputs.py carries out."""
