"""Sources to batches: mixed, split, freed of duplicates, streamed, packed and collated."""
