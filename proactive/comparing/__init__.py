"""Parts of `proactive.compare`: finished runs, their settings, metrics over folds and seeds, the page."""
