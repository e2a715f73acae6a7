"""Parts of `proactive.fit`: options, configurations, the run folder, resume, the runs of all folds."""
