"""What a run or an evaluation found out, as records, plots, pages and cards."""
