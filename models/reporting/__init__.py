"""Results of runs and evaluations: records, plots, pages, model cards, exports."""
