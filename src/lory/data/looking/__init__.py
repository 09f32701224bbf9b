"""Data as people look at them: statistics, histograms, excerpts."""
