"""Parts of `proactive.evaluate agent`: options, preparation, execution, metrics, the page."""
