"""Files of users and of runs: bounded reading, atomic writing, run folders."""
