"""Preference data: row -> Pair -> ids -> packed rows -> batches, one file per arrow."""
